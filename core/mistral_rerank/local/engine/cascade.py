"""The cascade: the first pass runs the lower layers on all passages, the second the others on the best passages."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from mistral_rerank.scores import Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.scores import Pair


class Cascade:
    """The cascade over the pairs of one call; `depth` passages of a question reach the second pass.

    Attributes:
        over_depth: the pairs of questions with more passages than that, without duplicates. The first pass estimates
            their scores.

    """

    def __init__(self, pairs: Sequence[Pair], depth: int) -> None:
        self._pairs, self._depth = pairs, depth
        self._estimates: dict[Pair, Score] = {}
        self.over_depth: list[Pair] = []
        if len(pairs) > depth:
            distinct = dict.fromkeys(pairs)
            passages = Counter(question for question, _ in distinct)
            self.over_depth = [pair for pair in distinct if passages[pair[0]] > depth]

    def choose(self, estimates: Sequence[Score]) -> Sequence[Pair]:
        """Choose the pairs of the second pass from the estimates of the first, in input order.

        Of a question over the cascade's depth these are the passages with the highest estimates; ties go to the
        earlier passage.
        """
        estimated = dict(zip(self.over_depth, estimates, strict=True))
        chosen: Counter[str] = Counter()
        for pair in sorted(estimated, key=lambda pair: -estimated[pair].logit):
            chosen[pair[0]] += 1
            if chosen[pair[0]] > self._depth:
                self._estimates[pair] = estimated[pair]
        return [pair for pair in self._pairs if pair not in self._estimates]

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Return the scores of all pairs: those of the second pass, and estimates for the others.

        Estimates rank below every score of the same question's second pass: one that is higher is lowered to the next
        smaller number. Their order stays.
        """
        remaining = iter(scores)
        by_pair = {pair: next(remaining) for pair in self._pairs if pair not in self._estimates}
        lowest: dict[str, Score] = {}
        for (question, _), score in by_pair.items():
            lowest[question] = min(score, lowest.get(question, score), key=lambda score: score.logit)
        for pair, estimate in self._estimates.items():  # highest first
            by_pair[pair] = lowest[pair[0]] = _below(lowest[pair[0]], estimate)
        return [by_pair[pair] for pair in self._pairs]


def _below(bound: Score, estimate: Score) -> Score:
    if estimate.logit < bound.logit:
        return estimate
    return Score(math.nextafter(bound.logit, -math.inf), bound.probability, estimate.tokens)
