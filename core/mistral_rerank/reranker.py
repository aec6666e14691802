"""The one interface of every reranker, and the values it gives.

A reranker scores (question, passage) pairs. Ordering, cutting and thresholds follow from the scores and are
written here once, so that a local model, a remote endpoint and a test's stand-in all rank alike. This module
knows no model, no transport and no framework.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from mistral_rerank.errors import InvalidInputError, ScoringError

if TYPE_CHECKING:
    from collections.abc import Sequence
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
        logit: the raw output of the binary head, or an estimate of it (see `contenders` of `LocalReranker`); higher
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

        Args:
            pairs: questions with passages.
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
            passages: the candidates; equal texts stay apart, told by their index.
            top_n: how many to return at most; None for all. 0 gives an empty list without scoring.
            min_score: leave out passages under this probability, before `top_n` counts.
            overflow: as in `score_pairs`.

        Returns:
            Passages sorted by (-logit, index).

        Raises:
            InvalidInputError: as `score_pairs`, or `top_n` negative, or `min_score` outside [0, 1].

        """
        if not check_ranking(query, passages, top_n=top_n, min_score=min_score):
            return []
        scores = self.score_pairs([(query, passage) for passage in passages], overflow=overflow)
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
        if not check_ranking(query, passages, top_n=top_n, min_score=min_score):
            return []
        scores = await self.ascore_pairs([(query, passage) for passage in passages], overflow=overflow)
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


def check_pairs(pairs: Sequence[Pair]) -> None:
    """Refuse pairs that no reranker can score, naming the position and never the text.

    Raises:
        InvalidInputError: a text is not a string, or a question is blank.

    """
    for position, (query, passage) in enumerate(pairs):
        if not isinstance(query, str) or not isinstance(passage, str):
            kind = type(passage if isinstance(query, str) else query).__name__
            raise InvalidInputError(f"pair {position} must be two strings (question, passage), got a {kind}")
        if not query.strip():
            raise InvalidInputError(f"the question of pair {position} is empty; give it some text")


def check_query(query: str) -> None:
    """Refuse a question that is no text or blank.

    Raises:
        InvalidInputError: saying so.

    """
    if not isinstance(query, str) or not query.strip():
        raise InvalidInputError("the question is empty; give the text to rank the passages by")


def check_ranking(query: str, passages: Sequence[str], *, top_n: int | None, min_score: float | None) -> bool:
    """Refuse arguments that make no sense; False when the result is empty whatever the scores."""
    check_query(query)
    if isinstance(passages, str):
        raise InvalidInputError("passages is one string; give a list of strings")
    if top_n is not None and top_n < 0:
        raise InvalidInputError(f"top_n is {top_n}; give 0 or more, or None for all passages")
    if min_score is not None and not 0.0 <= min_score <= 1.0:
        raise InvalidInputError(f"min_score is {min_score}; it is a probability, so give 0 to 1")
    return len(passages) > 0 and top_n != 0


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
