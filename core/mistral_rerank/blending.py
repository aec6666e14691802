"""Blending: a reranker's ranking together with what the first stage knew.

Logits and retriever scores are standardized within the passages of a question (z-scores), and their weighted mean
decides the order. Without retriever scores the negative logarithm of the rank takes their place. Scores and
probabilities stay the reranker's.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from mistral_rerank.scores import BLANK_SCORE, Ranking

if TYPE_CHECKING:
    from collections.abc import Sequence


def blend(ranking: Ranking, retriever_scores: Sequence[float | None], weight: float) -> Ranking:
    """Reorder the ranking of all passages of a call.

    Args:
        ranking: of all passages, so without `top_n` and `min_score`.
        retriever_scores: by the position in the input; higher is better. If one is None, the ranks are used.
        weight: of the first stage, from 0 (the reranker alone) to 1 (the first stage alone).

    """
    by_index = sorted(ranking, key=lambda passage: passage.index)
    order = blended_order([passage.score.logit for passage in by_index], retriever_scores, weight)
    blended = Ranking(by_index[position] for position in order)
    blended.usage = ranking.usage
    return blended


def blended_order(logits: Sequence[float], retriever_scores: Sequence[float | None], weight: float) -> list[int]:
    """Return the positions of passages, best first; blank passages stay last. Arguments as for `blend`."""
    scored = [position for position, logit in enumerate(logits) if logit > BLANK_SCORE.logit]
    known = [score for score in retriever_scores if score is not None and math.isfinite(score)]
    first_stage = known if len(known) == len(logits) else [-math.log(rank) for rank in range(1, len(logits) + 1)]
    ours = _standardized([logits[position] for position in scored])
    theirs = _standardized([first_stage[position] for position in scored])
    blended = {
        position: (1 - weight) * own + weight * other for position, own, other in zip(scored, ours, theirs, strict=True)
    }
    return sorted(range(len(logits)), key=lambda position: (-blended.get(position, -math.inf), position))


def _standardized(values: Sequence[float]) -> list[float]:
    """Subtract the mean and divide by the standard deviation; equal values become 0."""
    if not values:
        return []
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]
