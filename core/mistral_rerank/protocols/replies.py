"""Reads the scores of a reply of any protocol, and validates everything in it.

Servers that claim one protocol reply in the form of another, so one reader serves all: a list of entries, bare or in
one of three fields, each with an index and a score. A field that is `null` counts as absent.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import InvalidReplyError
from mistral_rerank.scores import Score, Usage, sigmoid

if TYPE_CHECKING:
    from mistral_rerank.reranker import Unit

LISTS = ("rankings", "results", "data")
SCORES = ("logit", "score", "relevance_score")
TOKENS = (("usage", "total_tokens"), ("usage", "prompt_tokens"), ("meta", "tokens", "input_tokens"))
"""Paths of the number of tokens; the first that a reply has counts."""
ROUNDING = 1e-4
"""Tolerance of a probability outside [0, 1], for arithmetic in low precision."""


@dataclass(frozen=True, slots=True)
class ReplyScores:
    """The scores of a reply, in the request's order.

    Attributes:
        scores: one for each passage.
        calibrated: whether the endpoint gave every probability. If not, it is the sigmoid of the logit.
        named: whether the endpoint called its scores logits. If not, the protocol implies their unit.
        usage: what the endpoint says that the request used.

    """

    scores: list[Score]
    calibrated: bool
    named: bool
    usage: Usage


def read_scores(content: bytes, *, count: int, unit: Unit) -> ReplyScores:
    """Read the scores of a reply to a request of `count` passages; entries may call their scores logits despite `unit`.

    Raises:
        InvalidReplyError: it is not JSON, an index is missing, duplicate, out of range or no integer, a score is no
            finite number, or a passage has no score.

    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidReplyError(f"{len(content)} bytes that are not JSON; is this a rerank endpoint?") from None
    entries: Any = _list(body)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidReplyError(f"no list of scores under any of {', '.join(LISTS)}; is this a rerank endpoint?")
    scores: list[Score | None] = [None] * count
    for entry in entries:
        index = _index(entry.get("index"))
        if index is None or not 0 <= index < count:
            raise InvalidReplyError(f"an entry has no index between 0 and {count - 1}: {_shown(entry.get('index'))}")
        if scores[index] is not None:
            raise InvalidReplyError(f"two entries have the index {index}")
        scores[index] = replace(
            _score(entry, unit), tokens=_count(entry, "tokens"), tokens_left_out=_count(entry, "tokens_left_out")
        )
    complete = [score for score in scores if score is not None]
    if len(complete) != count:
        raise InvalidReplyError(f"{len(complete)} scores for {count} passages")
    named = all(entry.get("logit") is not None for entry in entries)
    stated = all(entry.get("probability") is not None for entry in entries)
    calibrated = stated or (unit == "probability" and not named)
    return ReplyScores(complete, calibrated=calibrated, named=named, usage=_usage(body))


def holds_scores(body: object) -> bool:
    """Whether a decoded body has a list of scores, valid or not."""
    return bool(_list(body))


def is_probability(value: float) -> bool:
    """Whether a number is a probability, within `ROUNDING`."""
    return -ROUNDING <= value <= 1 + ROUNDING


def from_probability(value: float) -> Score:
    """Make a score from a probability, clamped to [0, 1]; its logit is finite at 0 and 1 too."""
    probability = min(max(value, 0.0), 1.0)
    inside = min(max(probability, 1e-300), 1 - 2**-53)
    return Score(math.log(inside) - math.log1p(-inside), probability)


def _list(body: object) -> object:
    if isinstance(body, dict):
        return next((body[name] for name in LISTS if body.get(name) is not None), None)
    return body if isinstance(body, list) else None


def _index(value: object) -> int | None:
    """Read 1, 1.0 and "1" as 1."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if type(value) is int else None


def _score(entry: dict[str, Any], unit: Unit) -> Score:
    name = next((name for name in SCORES if entry.get(name) is not None), None)
    value = _number(entry.get(name) if name else None)
    if unit == "probability" and name != "logit":
        return _checked_probability(value)
    stated = entry.get("probability")
    return Score(value, sigmoid(value) if stated is None else _checked_probability(_number(stated)).probability)


def _usage(body: object) -> Usage:
    """Read Jina's, Voyage's and vLLM's `usage`, and Cohere's `meta`."""
    tokens = next((count for path in TOKENS if (count := _count(body, *path))), 0)
    return Usage(tokens, _count(body, "meta", "billed_units", "search_units"))


def _count(body: object, *path: str) -> int:
    """Read a positive number that an endpoint may give, such as 3 or 3.0; 0 if there is none."""
    for name in path:
        body = body.get(name) if isinstance(body, dict) else None
    if isinstance(body, float) and body.is_integer():
        body = int(body)
    return body if type(body) is int and body > 0 else 0


def _checked_probability(value: float) -> Score:
    if not is_probability(value):
        raise InvalidReplyError(
            f"a score of {_shown(value)} is no probability; if this endpoint gives raw logits, set score_unit='logit'"
        )
    return from_probability(value)


def _number(value: object) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:
        pass  # an integer beyond all floats
    raise InvalidReplyError(f"a score is no finite number: {_shown(value)}")


def _shown(value: object) -> str:
    """Show a number, but only the type of any other value, which may contain text."""
    return f"{value!r:.40}" if isinstance(value, int | float | None) else f"a {type(value).__name__}"
