"""Diversity: maximal marginal relevance, so that results do not repeat each other.

Passages are picked one by one: the next has the highest relevance minus its similarity to the most similar passage that
was picked before. Source: Carbonell and Goldstein 1998, https://doi.org/10.1145/290941.291025
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from mistral_rerank.scores import Ranking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WORD = re.compile(r"\w+")


def diversify(
    ranking: Ranking,
    diversity: float,
    *,
    top_n: int | None = None,
    embeddings: Sequence[Sequence[float] | None] = (),
) -> Ranking:
    """Reorder a ranking by maximal marginal relevance, and keep `top_n` of it.

    The relevance is the probability; if the ranking is in another order, that of the passage which the reranker has in
    the same place. The similarity is the cosine of embeddings, or else the share of common words (Jaccard).

    Args:
        ranking: best first.
        diversity: weight of the similarity, from 0 (the order stays) to 1 (similarity alone after the first passage).
        top_n: the most passages to keep; None for all.
        embeddings: of the passages, in the order of the ranking; if one is missing, words are compared.

    """
    relevance = sorted((passage.score.probability for passage in ranking), reverse=True)
    similarity = _similarity(ranking, embeddings)
    left, picked = list(range(len(ranking))), list[int]()
    closest = [0.0] * len(ranking)
    while left and (top_n is None or len(picked) < top_n):
        best = max(left, key=lambda place: ((1 - diversity) * relevance[place] - diversity * closest[place], -place))
        left.remove(best)
        picked.append(best)
        for place in left:
            closest[place] = max(closest[place], similarity(place, best))
    diversified = Ranking(ranking[place] for place in picked)
    diversified.usage, diversified.error = ranking.usage, ranking.error
    return diversified


def _similarity(ranking: Ranking, embeddings: Sequence[Sequence[float] | None]) -> Callable[[int, int], float]:
    """Give the function that compares two places of a ranking, from 0 to 1 (or from -1 for embeddings)."""
    vectors = [vector for vector in embeddings if vector is not None]
    if vectors and len(vectors) == len(ranking):
        lengths = [math.hypot(*vector) or 1.0 for vector in vectors]
        unit = [[value / length for value in vector] for vector, length in zip(vectors, lengths, strict=True)]
        return lambda one, two: sum(a * b for a, b in zip(unit[one], unit[two], strict=True))
    words = [frozenset(WORD.findall(passage.text.lower())) for passage in ranking]
    return lambda one, two: len(words[one] & words[two]) / (len(words[one] | words[two]) or 1)
