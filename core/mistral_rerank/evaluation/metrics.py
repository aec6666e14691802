"""Ranking metrics per query by pytrec_eval, bootstrap intervals of their means, and calibration errors."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.errors import InvalidInputError, MissingDependencyError

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

BINS = 15
SMALLEST = 1e-15
"""Probabilities are clipped to this distance from 0 and 1 before the logarithm."""

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
    """Measure every judged query; give query id -> measure -> value, in the order of `qrels`.

    Args:
        qrels: query id -> passage id -> grade; a grade above 0 is relevant, and nDCG gains as much as the grade.
        run: query id -> passages with distinct scores, best first. A query without results counts 0.
        recall_at: add "Recall@<this>", the upper bound of reranking that many candidates.

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
    """Give the means of `RESAMPLES` bootstrap samples of paired differences (queries,), after minus before.

    The name of the data set is part of the seed, so that its samples do not depend on the other sets.
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


@dataclass(frozen=True, slots=True)
class Bin:
    """One row of the reliability table: pairs, their mean probability, and the share of them that is relevant."""

    pairs: int
    probability: float
    share: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """How well the probabilities of labelled pairs are calibrated.

    Attributes:
        pairs: how many.
        relevant: share of relevant pairs.
        ece: expected calibration error: the mean over pairs of |mean probability - share relevant| of their bin.
        brier: the mean squared difference from the label.
        nll: the mean negative log likelihood, in nats.
        bins: of equally many pairs, by rising probability.

    """

    pairs: int
    relevant: float
    ece: float
    brier: float
    nll: float
    bins: tuple[Bin, ...]


def reliability(probabilities: Sequence[float], labels: Sequence[int], *, bins: int = BINS) -> Reliability:
    """Compare probabilities (pairs,) with labels (pairs,), 0 or 1, in at most `bins` bins of equal numbers of pairs.

    Raises:
        InvalidInputError: there are no pairs, or a label is neither 0 nor 1.

    Source: equal-mass bins as in Nguyen and O'Connor 2015, arXiv 1508.05154.

    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if p.size == 0 or p.shape != y.shape:
        raise InvalidInputError(f"{p.size} probabilities with {y.size} labels; give one label a pair, and some pairs")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InvalidInputError("a label is neither 0 nor 1")
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, bins) if part.size]
    table = tuple(Bin(int(part.size), float(p[part].mean()), float(y[part].mean())) for part in parts)
    clipped = np.clip(p, SMALLEST, 1 - SMALLEST)
    return Reliability(
        pairs=int(p.size),
        relevant=float(y.mean()),
        ece=sum(part.pairs * abs(part.probability - part.share) for part in table) / p.size,
        brier=float(np.mean((p - y) ** 2)),
        nll=float(-np.mean(y * np.log(clipped) + (1 - y) * np.log(1 - clipped))),
        bins=table,
    )
