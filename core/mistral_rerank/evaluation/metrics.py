"""Ranking metrics per query by pytrec_eval, and bootstrap intervals of their means."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MEASURES = {
    "nDCG@10": "ndcg_cut_10",
    "Recall@5": "recall_5",
    "Recall@1": "recall_1",
    "MRR": "recip_rank",
    "P@1": "P_1",
}
"""The measures and their names in trec_eval."""

HEADLINE = ("nDCG@10", "Recall@5", "MRR")
"""The measures that are printed."""

RESAMPLES = 10_000
"""Bootstrap samples per interval."""

Values = dict[str, float]
"""Measure -> value."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the middle 95% of its bootstrap distribution."""

    mean: float
    low: float
    high: float


def per_query(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Sequence[tuple[str, float]]],
    *,
    recall_at: int | None = None,
) -> dict[str, Values]:
    """Measure every judged query.

    Args:
        qrels: query id -> passage id -> grade; a grade above 0 is relevant, and nDCG gains as much as the grade.
        run: query id -> passages with distinct scores, best first. A query without results counts 0.
        recall_at: add "Recall@<this>", the upper bound of reranking that many candidates.

    Returns:
        Query id -> measure -> value, in the order of `qrels`.

    Raises:
        MissingDependencyError: the extra `eval` is not installed.

    """
    try:
        import pytrec_eval
    except ImportError as error:
        raise MissingDependencyError.of("eval", error) from error
    names = dict(MEASURES)
    if recall_at is not None:
        names.setdefault(f"Recall@{recall_at}", f"recall_{recall_at}")
    cuts = ",".join(map(str, sorted({1, 5, recall_at or 5})))
    trec_names = {"ndcg_cut.10", f"recall.{cuts}", "recip_rank", "P.1"}
    evaluator = pytrec_eval.RelevanceEvaluator({query: dict(grades) for query, grades in qrels.items()}, trec_names)
    values = evaluator.evaluate({query: dict(ranking) for query, ranking in run.items() if query in qrels})
    return {query: {name: float(values.get(query, {}).get(key, 0.0)) for name, key in names.items()} for query in qrels}


def mean(values: Mapping[str, Values], measure: str) -> float:
    """Average one measure over queries."""
    return sum(of_query[measure] for of_query in values.values()) / len(values)


def resampled_means(differences: Sequence[float], *, seed: int, name: str) -> NDArray[np.float64]:
    """Give the means of `RESAMPLES` bootstrap samples of paired differences.

    Args:
        differences: (queries,), after minus before.
        seed: seeds the samples, together with `name`.
        name: of the data set, so that its samples do not depend on the other sets.

    """
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    block = max(1, 4_000_000 // len(values))
    means = [
        values[rng.integers(0, len(values), (min(block, RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(means)


def interval(center: float, means: NDArray[np.float64]) -> Interval:
    """Give the middle 95% of bootstrap means."""
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(center, float(low), float(high))
