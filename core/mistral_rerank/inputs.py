"""The inputs of calls: validation, and pairs without text, which are not scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mistral_rerank.errors import InvalidInputError, ScoringError
from mistral_rerank.scores import BLANK_SCORE, Pair, Score


class CheckedPairs(list[Pair]):
    """Pairs that are valid, so that they are not checked again."""


class TextPairs:
    """The pairs of a call; `pairs` are those whose passages are not blank, in order."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        checked = pairs if isinstance(pairs, CheckedPairs) else check_pairs(pairs)
        self._has_text = [bool(passage) and not passage.isspace() for _, passage in checked]
        self.pairs: Sequence[Pair] = CheckedPairs(
            pair for pair, has_text in zip(checked, self._has_text, strict=True) if has_text
        )

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Return the scores of all pairs, given those of the pairs with text."""
        if len(scores) != sum(self._has_text):
            raise ScoringError(f"{sum(self._has_text)} pairs were scored, and {len(scores)} scores came")
        remaining = iter(scores)
        return [next(remaining) if has_text else BLANK_SCORE for has_text in self._has_text]


def check_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Validate pairs and return them as a list. Errors name the position of a pair, never its text."""
    checked: list[Pair] = []
    for position, pair in enumerate(_listed(pairs, "pairs", "a list of (question, passage)")):
        if isinstance(pair, str) or not _has_two(pair):
            raise InvalidInputError(
                f"pair {position} must be two strings (question, passage), got {_type_name(pair)}; "
                "the call is score_pairs([(question, passage), ...])"
            )
        query, passage = pair
        if not isinstance(query, str) or not isinstance(passage, str):
            kind = _type_name(passage if isinstance(query, str) else query)
            raise InvalidInputError(f"pair {position} must be two strings (question, passage), got {kind}")
        if not query.strip():
            raise InvalidInputError(f"the question of pair {position} is empty; give it some text")
        checked.append((query, passage))
    return checked


def check_query(query: str) -> None:
    """Refuse a question that is not a string, or blank."""
    if query is not None and not isinstance(query, str):
        raise InvalidInputError(
            f"the question must be a string, got {_type_name(query)}; the question comes before the passages"
        )
    if not query or query.isspace():
        raise InvalidInputError("the question is empty; give the text to rank the passages by")


def check_passages(query: str, passages: Iterable[str]) -> list[str]:
    """Refuse arguments of `rank` of the wrong types, or swapped; return the passages as a list."""
    if isinstance(passages, str) and not isinstance(query, str):
        raise InvalidInputError(
            f"the question is {_type_name(query)} and passages is one string; they look swapped: "
            "the call is rank(question, passages)"
        )
    check_query(query)
    checked = _listed(passages, "passages", "a list of strings")
    for position, passage in enumerate(checked):
        if not isinstance(passage, str):
            raise InvalidInputError(f"passage {position} must be a string, got {_type_name(passage)}")
    return checked


def check_ranking(
    passages: Sequence[str],
    *,
    top_n: int | None,
    min_score: float | None,
    max_gap: float | None,
    deadline: float | None,
) -> bool:
    """Validate the options of `rank`; return False if the result is empty for any scores."""
    if top_n is not None and top_n < 0:
        raise InvalidInputError(f"top_n is {top_n}; give 0 or more, or None for all passages")
    if min_score is not None and not 0.0 <= min_score <= 1.0:
        raise InvalidInputError(f"min_score is {min_score}; it is a probability, so give 0 to 1")
    if max_gap is not None and not max_gap >= 0:
        raise InvalidInputError(f"max_gap is {max_gap}; it is a difference of logits, so give 0 or more")
    if deadline is not None and not deadline > 0:
        raise InvalidInputError(f"deadline is {deadline}; give seconds above 0, or None for no limit")
    return len(passages) > 0 and top_n != 0


def check_adapter(name: str | None, known: Sequence[str]) -> None:
    """Refuse the name of an adapter that the model does not have; None names the model itself."""
    if name is not None and name not in known:
        given = ", ".join(known) or "none was given; open the reranker with adapters={name: folder}"
        raise InvalidInputError(f"there is no adapter {name!r:.80}; adapters: {given}")


def _listed(argument: Iterable[Any], name: str, expected: str) -> list[Any]:
    """Make a list of an argument, which may be a generator."""
    if isinstance(argument, str | bytes | Mapping) or not isinstance(argument, Iterable):
        raise InvalidInputError(f"{name} is {_type_name(argument)}; give {expected}")
    return list(argument)


def _has_two(pair: object) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2


def _type_name(argument: object) -> str:
    """Name the type of an argument for an error message, without its text."""
    return "one string" if isinstance(argument, str) else f"a {type(argument).__name__}"
