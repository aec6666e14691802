"""A cascade: the first pass runs the lower layers on all passages, the second the other layers on the best of them."""

from __future__ import annotations

import math
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
        cascade_depth: how many passages of a question are read to the end; None for all.

    Attributes:
        over_depth: the pairs of questions with more passages than that, each once; their estimates are wanted.

    """

    def __init__(self, pairs: Sequence[Pair], cascade_depth: int | None) -> None:
        self._pairs = pairs
        self._most = len(pairs) if cascade_depth is None else cascade_depth
        self._estimates: dict[Pair, Score] = {}
        self.over_depth: list[Pair] = []
        if len(pairs) > self._most:
            passages = Counter(question for question, _ in dict.fromkeys(pairs))
            self.over_depth = [pair for pair in dict.fromkeys(pairs) if passages[pair[0]] > self._most]

    def choose(self, estimates: Sequence[Score]) -> Sequence[Pair]:
        """Take the estimates and give the pairs to score, in input order.

        Of a crowded question those are the ones of the highest estimates; of equal ones the first.
        """
        if not self.over_depth:
            return self._pairs
        estimated = dict(zip(self.over_depth, estimates, strict=True))
        taken: Counter[str] = Counter()
        for pair in sorted(estimated, key=lambda pair: -estimated[pair].logit):
            taken[pair[0]] += 1
            if taken[pair[0]] > self._most:
                self._estimates[pair] = estimated[pair]
        return [pair for pair in self._pairs if pair not in self._estimates]

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Take the scores and give those of all pairs: where there is none an estimate.

        It is below every score of the query's second pass: an estimate that is not becomes the next number below,
        and the estimates keep their order.
        """
        if not self.over_depth:
            return list(scores)
        new = iter(scores)
        known = {pair: next(new) for pair in self._pairs if pair not in self._estimates}
        lowest: dict[str, Score] = {}
        for (question, _), score in known.items():
            lowest[question] = min(score, lowest.get(question, score), key=lambda score: score.logit)
        for pair, estimate in self._estimates.items():  # from the highest on
            known[pair] = lowest[pair[0]] = _under(lowest[pair[0]], estimate)
        return [known[pair] for pair in self._pairs]


def _under(bound: Score, estimate: Score) -> Score:
    if estimate.logit < bound.logit:
        return estimate
    return Score(math.nextafter(bound.logit, -math.inf), bound.probability, estimate.tokens)
