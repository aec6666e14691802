"""The one interface of every reranker, and the values it gives.

A reranker scores (question, passage) pairs. Ordering, cutting and thresholds follow from the scores and are
written here once, so that a local model, a remote endpoint and a test's stand-in all rank alike. This module
knows no model, no transport and no framework.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from mistral_rerank.errors import InvalidInputError, ScoringError

if TYPE_CHECKING:
    from types import TracebackType

Pair = tuple[str, str]
"""A question and a passage."""

Overflow = Literal["truncate", "chunk", "error"]
"""What happens to a pair over the model's limit: the passage is cut, scored in pieces, or refused."""

Quantization = Literal["int8", "nf4"]
"""How the linears of a model on this machine may be rounded."""


@dataclass(frozen=True, slots=True)
class Score:
    """What the model says of one pair.

    Attributes:
        logit: the raw output of the binary head, or an estimate of it (see `cascade_depth` of `LocalReranker`); higher
            is more relevant; unbounded.
        probability: sigmoid of the (calibrated) logit, in [0, 1].
        tokens: how many the model read for it; 0 where that is not known. Equal scores may differ in it.

    Raises:
        ScoringError: the logit is not finite.

    """

    logit: float
    probability: float
    tokens: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit):
            raise ScoringError(
                f"the model gave a logit of {self.logit}; its weights or its dtype are unusable here "
                "(try dtype='float32')"
            )

    @classmethod
    def from_logit(cls, logit: float, *, scale: float = 1.0, bias: float = 0.0, tokens: int = 0) -> Score:
        """Make a score of a raw logit; `scale` and `bias` are the calibration, probability's alone."""
        return cls(float(logit), sigmoid(scale * logit + bias), tokens)


BLANK_SCORE = Score(-1e4, 0.0)
"""Of every passage without text: under any logit that a model gives, and a number that JSON and float16 can hold."""


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage in its new place; `index` is its position in the input."""

    index: int
    text: str
    score: Score


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow at either end."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class Observer:
    """Is told what goes on inside a reranker, on whatever thread it happens; here it takes no notice."""

    def tokenized(self, seconds: float) -> None:
        """Note that the texts of a call became tokens."""

    def started(self, waited: float) -> None:
        """Note that the first batch of a call begins, so many seconds after the call came."""

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Note that a forward of so many sequences and padded tokens has run."""


class Reranker(ABC):
    """Scores pairs and ranks passages; safe to use from many threads and tasks at once.

    Subclasses write `score_pairs` and `ascore_pairs`, both in input order; the rest follows from them.
    Usable as a context manager, synchronous or asynchronous. A deep copy of something that holds a reranker
    holds the same one: its weights and connections are not doubled.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    @property
    @abstractmethod
    def model_name(self) -> str:
        """What to call the model in traces and reports."""

    @abstractmethod
    def score_pairs(self, pairs: Sequence[Pair], *, overflow: Overflow | None = None) -> list[Score]:
        """Score every (question, passage) pair, in input order.

        A passage that is empty or blank is not scored: it gets `BLANK_SCORE`, whose probability is 0.

        Args:
            pairs: questions with passages; a generator will do.
            overflow: what happens to over-long ones in this call; None for the reranker's own choice.

        Raises:
            InvalidInputError: a text is not a string, a question is blank, or an input is too long.
            ScoringError: the model gave no usable score. There is never a partial result.

        """

    @abstractmethod
    async def ascore_pairs(self, pairs: Sequence[Pair], *, overflow: Overflow | None = None) -> list[Score]:
        """`score_pairs` without blocking the event loop; cancelling frees the place in the queue."""

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        top_n: int | None = None,
        min_score: float | None = None,
        overflow: Overflow | None = None,
    ) -> list[RankedPassage]:
        """Order passages by how well they answer the question, best first.

        Args:
            query: the question.
            passages: the candidates; equal texts stay apart, told by their index. Blank ones come last, with
                probability 0. A generator will do.
            top_n: how many to return at most; None for all. 0 gives an empty list without scoring.
            min_score: leave out passages under this probability, before `top_n` counts.
            overflow: as in `score_pairs`.

        Returns:
            Passages sorted by (-logit, index).

        Raises:
            InvalidInputError: as `score_pairs`, or `top_n` negative, or `min_score` outside [0, 1].

        """
        passages = check_passages(query, passages)
        if not check_ranking(passages, top_n=top_n, min_score=min_score):
            return []
        call = TextPairs([(query, passage) for passage in passages])
        scores = call.complete(self.score_pairs(call.pairs, overflow=overflow) if call.pairs else [])
        return order(passages, scores, top_n=top_n, min_score=min_score)

    async def arank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        top_n: int | None = None,
        min_score: float | None = None,
        overflow: Overflow | None = None,
    ) -> list[RankedPassage]:
        """`rank` without blocking the event loop."""
        passages = check_passages(query, passages)
        if not check_ranking(passages, top_n=top_n, min_score=min_score):
            return []
        call = TextPairs([(query, passage) for passage in passages])
        scores = call.complete(await self.ascore_pairs(call.pairs, overflow=overflow) if call.pairs else [])
        return order(passages, scores, top_n=top_n, min_score=min_score)

    def observe(self, observer: Observer) -> None:  # noqa: B027 - only a model on this machine has batches
        """Tell `observer` from now on what goes on inside."""

    def close(self) -> None:  # noqa: B027 - most rerankers of a test hold nothing
        """Free what the reranker holds; calling it twice is harmless."""

    async def aclose(self) -> None:
        """`close` for asynchronous code."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class TextPairs:
    """The pairs of a call that have a passage to score; blank passages are neither scored nor sent.

    Args:
        pairs: questions with passages.

    Attributes:
        pairs: those whose passages hold text, in order.

    Raises:
        InvalidInputError: as `check_pairs`.

    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        checked = check_pairs(pairs)
        self._has_text = [bool(passage) and not passage.isspace() for _, passage in checked]
        self.pairs = [pair for pair, has_text in zip(checked, self._has_text, strict=True) if has_text]

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Take the scores of `pairs` and give those of all."""
        if len(scores) != len(self.pairs):
            raise ScoringError(f"{len(self.pairs)} pairs were scored, and {len(scores)} scores came")
        new = iter(scores)
        return [next(new) if has_text else BLANK_SCORE for has_text in self._has_text]


def check_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Give the pairs as a list of tuples; refuse what no reranker can score, naming the position and never the text.

    Raises:
        InvalidInputError: a text is not a string, or a question is blank.

    """
    checked: list[Pair] = []
    for position, pair in enumerate(_listed(pairs, "pairs", "a list of (question, passage)")):
        if isinstance(pair, str) or not _has_two(pair):
            raise InvalidInputError(
                f"pair {position} must be two strings (question, passage), got {_kind(pair)}; "
                "the call is score_pairs([(question, passage), ...])"
            )
        query, passage = pair
        if not isinstance(query, str) or not isinstance(passage, str):
            kind = _kind(passage if isinstance(query, str) else query)
            raise InvalidInputError(f"pair {position} must be two strings (question, passage), got {kind}")
        if not query.strip():
            raise InvalidInputError(f"the question of pair {position} is empty; give it some text")
        checked.append((query, passage))
    return checked


def check_query(query: str) -> None:
    """Refuse a question that is no text or blank.

    Raises:
        InvalidInputError: saying so.

    """
    if query is not None and not isinstance(query, str):
        raise InvalidInputError(
            f"the question must be a string, got {_kind(query)}; the question comes before the passages"
        )
    if not query or query.isspace():
        raise InvalidInputError("the question is empty; give the text to rank the passages by")


def check_passages(query: str, passages: Iterable[str]) -> list[str]:
    """Give the passages as a list, after a look at both arguments.

    Raises:
        InvalidInputError: one of them is of another kind, or they are swapped.

    """
    if isinstance(passages, str) and not isinstance(query, str):
        raise InvalidInputError(
            f"the question is {_kind(query)} and passages is one string; they look swapped: "
            "the call is rank(question, passages)"
        )
    check_query(query)
    return _listed(passages, "passages", "a list of strings")


def check_ranking(passages: Sequence[str], *, top_n: int | None, min_score: float | None) -> bool:
    """Refuse arguments that make no sense; False when the result is empty whatever the scores."""
    if top_n is not None and top_n < 0:
        raise InvalidInputError(f"top_n is {top_n}; give 0 or more, or None for all passages")
    if min_score is not None and not 0.0 <= min_score <= 1.0:
        raise InvalidInputError(f"min_score is {min_score}; it is a probability, so give 0 to 1")
    return len(passages) > 0 and top_n != 0


def _listed(given: Iterable[Any], name: str, expected: str) -> list[Any]:
    """Read an argument that may be a generator, once."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise InvalidInputError(f"{name} is {_kind(given)}; give {expected}")
    return list(given)


def _has_two(pair: object) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2


def _kind(given: object) -> str:
    """Name the type of an argument, and never its text."""
    return "one string" if isinstance(given, str) else f"a {type(given).__name__}"


def order(
    passages: Sequence[str],
    scores: Sequence[Score],
    *,
    top_n: int | None = None,
    min_score: float | None = None,
) -> list[RankedPassage]:
    """Sort by (-logit, index), then apply `min_score`, then `top_n`."""
    ranked = [
        RankedPassage(index, text, score)
        for index, (text, score) in enumerate(zip(passages, scores, strict=True))
        if min_score is None or score.probability >= min_score
    ]
    ranked.sort(key=lambda passage: (-passage.score.logit, passage.index))
    return ranked[:top_n]
