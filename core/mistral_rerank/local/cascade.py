"""A cascade: the lower layers choose a question's contenders, and those alone are read to the end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from mistral_rerank.reranker import Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.reranker import Pair


class Cascade:
    """The pairs of one call.

    Args:
        pairs: questions with passages.
        contenders: how many passages of a question are read to the end; None for all.

    Attributes:
        crowded: the pairs of questions with more passages than that, each once; their estimates are wanted.

    """

    def __init__(self, pairs: Sequence[Pair], contenders: int | None) -> None:
        self._pairs = pairs
        self._most = len(pairs) if contenders is None else contenders
        self._estimates: dict[Pair, Score] = {}
        self.crowded: list[Pair] = []
        if len(pairs) > self._most:
            passages = Counter(question for question, _ in dict.fromkeys(pairs))
            self.crowded = [pair for pair in dict.fromkeys(pairs) if passages[pair[0]] > self._most]

    def choose(self, estimates: Sequence[Score]) -> Sequence[Pair]:
        """Take the estimates and give the pairs to score, in input order.

        Of a crowded question those are the ones of the highest estimates; of equal ones the first.
        """
        if not self.crowded:
            return self._pairs
        estimated = dict(zip(self.crowded, estimates, strict=True))
        taken: Counter[str] = Counter()
        for pair in sorted(estimated, key=lambda pair: -estimated[pair].logit):
            taken[pair[0]] += 1
            if taken[pair[0]] > self._most:
                self._estimates[pair] = estimated[pair]
        return [pair for pair in self._pairs if pair not in self._estimates]

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Take the scores and give those of all pairs: where there is none an estimate.

        It is at most the lowest score of the contenders, so that they stay in front.
        """
        if not self.crowded:
            return list(scores)
        new = iter(scores)
        whole = [self._estimates.get(pair) or next(new) for pair in self._pairs]
        lowest: dict[str, Score] = {}
        for pair, score in zip(self._pairs, whole, strict=True):
            if pair not in self._estimates:
                lowest[pair[0]] = min(score, lowest.get(pair[0], score), key=lambda score: score.logit)
        return [
            _at_most(score, lowest[pair[0]]) if pair in self._estimates else score
            for pair, score in zip(self._pairs, whole, strict=True)
        ]


def _at_most(estimate: Score, lowest: Score) -> Score:
    if estimate.logit <= lowest.logit:
        return estimate
    return Score(lowest.logit, lowest.probability, estimate.tokens)
