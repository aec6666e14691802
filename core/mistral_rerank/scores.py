"""Scores of pairs, and rankings made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mistral_rerank.errors import ScoringError
from mistral_rerank.sentences import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

Pair = tuple[str, str]
"""A question and a passage."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one pair.

    Attributes:
        logit: the raw output of the binary head, or an estimate of it (see `cascade_depth` of `LocalReranker`); higher
            is more relevant; unbounded.
        probability: sigmoid of the (calibrated) logit, in [0, 1].
        tokens: number of tokens that the model read, of the question and the passage; 0 if unknown. It does not count
            in comparisons.
        tokens_left_out: number of the passage's tokens over the limit, which the model did not read; an estimate for a
            very long passage. It does not count in comparisons.

    Raises:
        ScoringError: the logit is not finite.

    """

    logit: float
    probability: float
    tokens: int = field(default=0, compare=False)
    tokens_left_out: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit):
            raise ScoringError(
                f"the model gave a logit of {self.logit}; its weights or its dtype are unusable here "
                "(try dtype='float32')"
            )

    @classmethod
    def from_logit(cls, logit: float, *, scale: float = 1.0, bias: float = 0.0, tokens: int = 0) -> Score:
        """Make a score of a raw logit; the calibration, `scale` and `bias`, changes the probability only."""
        return cls(float(logit), sigmoid(scale * logit + bias), tokens)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call used.

    Attributes:
        tokens: that the model read, cached pairs included, or that the endpoint counted; 0 if unknown.
        search_units: that Cohere's protocol says are billed; 0 without any.

    """

    tokens: int = 0
    search_units: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.tokens + other.tokens, self.search_units + other.search_units)


class Scores(list[Score]):
    """Scores with the usage that an endpoint states."""

    usage = Usage()


def usage_of(scores: Sequence[Score]) -> Usage:
    """Return the usage that an endpoint states, or else the tokens of the scores."""
    stated = scores.usage if isinstance(scores, Scores) else Usage()
    return replace(stated, tokens=stated.tokens or sum(score.tokens for score in scores))


BLANK_SCORE = Score(-1e4, 0.0)
"""The score of a passage without text: below any logit of a model, and finite in JSON and float16."""


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage of a ranking.

    Attributes:
        index: its position in the input.
        highlight: start and end of its best sentence, where that was asked for.

    """

    index: int
    text: str
    score: Score
    highlight: Span | None = None


UNSCORED = Score(-1e4, 0.0)
"""The score of a passage that was not scored, because its call kept the retriever's order."""


class Highlights(list[Span | None]):
    """Start and end of the best sentence of each passage, in characters (Unicode code points); None for a blank one.

    Attributes:
        usage: of the call that scored the sentences.

    """

    usage = Usage()


class Ranking(list[RankedPassage]):
    """Passages in the order of a result.

    Attributes:
        usage: of the call, with the passages that `min_score` and `top_n` drop.
        error: why they are in the retriever's order, with `UNSCORED` as their scores; None if they are ranked.

    """

    usage = Usage()
    error: Exception | None = None

    def mark(self, highlights: Highlights) -> None:
        """Set the best sentences, and add the usage of finding them."""
        self[:] = [replace(ranked, highlight=span) for ranked, span in zip(self, highlights, strict=True)]
        self.usage += highlights.usage

    def selected(self, *, top_n: int | None, min_score: float | None, max_gap: float | None) -> Ranking:
        """Apply `min_score` and `max_gap`, then `top_n`; the order stays."""
        least = -math.inf
        if max_gap is not None and self:
            least = max(passage.score.logit for passage in self) - max_gap
        passages = [
            passage
            for passage in self
            if passage.score.logit >= least and (min_score is None or passage.score.probability >= min_score)
        ]
        selected = Ranking(passages[:top_n])
        selected.usage, selected.error = self.usage, self.error
        return selected


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def order(
    passages: Sequence[str],
    scores: Sequence[Score],
    *,
    top_n: int | None = None,
    min_score: float | None = None,
    max_gap: float | None = None,
) -> Ranking:
    """Sort by (-logit, index), then apply `min_score` and `max_gap`, then `top_n`."""
    ranking = Ranking(
        RankedPassage(index, text, score) for index, (text, score) in enumerate(zip(passages, scores, strict=True))
    )
    ranking.sort(key=lambda passage: (-passage.score.logit, passage.index))
    return ranking.selected(top_n=top_n, min_score=min_score, max_gap=max_gap)
