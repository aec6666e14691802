"""Reading the reply of any contract, trusting nothing in it.

Servers that claim one contract answer in the words of another, unsorted, or with a passage missing, so there is
one reader for all: a list of entries, under one of three names or bare, each with an index and a score.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import InvalidReplyError
from mistral_rerank.reranker import Score, sigmoid

if TYPE_CHECKING:
    from mistral_rerank.protocols.contract import Unit

LISTS = ("rankings", "results", "data")
SCORES = ("logit", "score", "relevance_score")


def read_scores(content: bytes, *, count: int, unit: Unit) -> list[Score]:
    """Read the scores of a reply.

    Args:
        content: the body.
        count: how many passages the request held.
        unit: what the scores are, unless the entries call them logits.

    Returns:
        A score for each passage, in the request's order.

    Raises:
        InvalidReplyError: it is not JSON, or an index is missing, double, out of range or no integer, or a score
            is no finite number, or not all passages are scored.

    """
    entries = _entries(content)
    scores: list[Score | None] = [None] * count
    for entry in entries:
        index = entry.get("index")
        if type(index) is not int or not 0 <= index < count:
            raise InvalidReplyError(f"an entry has no index between 0 and {count - 1}: {_shown(index)}")
        if scores[index] is not None:
            raise InvalidReplyError(f"two entries have the index {index}")
        scores[index] = _score(entry, unit)
    found = [score for score in scores if score is not None]
    if len(found) != count:
        raise InvalidReplyError(f"{len(found)} scores for {count} passages")
    return found


def _entries(content: bytes) -> list[dict[str, Any]]:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidReplyError(f"{len(content)} bytes that are not JSON; is this a rerank endpoint?") from None
    if isinstance(body, dict):
        body = next((body[name] for name in LISTS if name in body), body)
    if not isinstance(body, list) or not all(isinstance(entry, dict) for entry in body):
        raise InvalidReplyError(f"no list of scores under any of {', '.join(LISTS)}; is this a rerank endpoint?")
    return body


def _score(entry: dict[str, Any], unit: Unit) -> Score:
    name = next((name for name in SCORES if name in entry), None)
    value = _number(entry.get(name) if name else None)
    if unit == "logit" or name == "logit":
        probability = _number(entry["probability"]) if "probability" in entry else sigmoid(value)
    else:
        probability = value
        if 0 <= value <= 1:
            value = log_odds(value)
    if not 0 <= probability <= 1:
        raise InvalidReplyError(
            f"a score of {_shown(probability)} is no probability; if this endpoint gives raw logits, "
            "set score_unit='logit'"
        )
    return Score(value, probability)


def log_odds(probability: float) -> float:
    """Give the logit whose sigmoid is `probability`, finite at 0 and 1 too."""
    inside = min(max(probability, 1e-300), 1 - 2**-53)
    return math.log(inside) - math.log1p(-inside)


def _number(value: object) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass  # an integer beyond all floats
    raise InvalidReplyError(f"a score is no finite number: {_shown(value)}")


def _shown(value: object) -> str:
    """Show a number; of anything else, which may hold text, only the type."""
    return f"{value!r:.40}" if isinstance(value, int | float | None) else f"a {type(value).__name__}"
