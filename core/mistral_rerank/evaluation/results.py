"""Results of an evaluation: one value object per data set, and the figures that are printed and written."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mistral_rerank._version import __version__
from mistral_rerank.evaluation.metrics import MEASURES, interval, mean, reliability, resampled_means

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mistral_rerank.evaluation.metrics import Interval, Reliability, Values

DEPTHS = (2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True, slots=True)
class Shown:
    """A passage at the top of a ranking, shown in the report; the grade is None if nobody judged it."""

    passage: str
    text: str
    grade: int | None


@dataclass(frozen=True, slots=True)
class Example:
    """A question whose nDCG@10 changed much, with its first passages before and after reranking."""

    query: str
    text: str
    gain: float
    before: tuple[Shown, ...]
    after: tuple[Shown, ...]


@dataclass(frozen=True, slots=True)
class SetResult:
    """Results on one data set.

    Attributes:
        passages: size of the corpus.
        first_stage: query id -> measure -> value, before reranking.
        reranked: query id -> measure -> value.
        by_depth: number of candidates reranked -> measure -> mean; 0 is the first stage alone.
        probabilities: (pairs,), of all queries.
        labels: (pairs,), 1 where the passage is judged relevant, else 0.
        seconds: (queries,), that reranking took.
        examples: the worst losses first, then the best gains.

    """

    name: str
    passages: int
    first_stage: Mapping[str, Values]
    reranked: Mapping[str, Values]
    by_depth: Mapping[int, Values]
    probabilities: tuple[float, ...]
    labels: tuple[int, ...]
    seconds: tuple[float, ...]
    examples: tuple[Example, ...]

    def gains(self, measure: str) -> list[float]:
        """Give after minus before, for every query."""
        return [self.reranked[query][measure] - self.first_stage[query][measure] for query in self.reranked]


@dataclass(frozen=True, slots=True)
class Figures:
    """The means of a data set, or of all of them, whose name is "mean".

    Attributes:
        first_stage: measure -> mean, before reranking.
        reranked: measure -> mean.
        gain: measure -> mean gain with its 95% bootstrap interval over queries.
        ceiling: Recall@k of the candidates, the upper bound of reranking them.
        wins: queries whose nDCG@10 rose.
        losses: queries whose nDCG@10 fell.
        by_depth: as `SetResult.by_depth`.
        reliability: of the scored pairs; None if there are none.

    """

    name: str
    queries: int
    passages: int
    first_stage: Values
    reranked: Values
    gain: Mapping[str, Interval]
    ceiling: float
    wins: int
    losses: int
    by_depth: Mapping[int, Values]
    reliability: Reliability | None


def depths(top_k: int) -> list[int]:
    """Give the numbers of candidates in `by_depth`; 0 first, `top_k` last."""
    return [0, *(depth for depth in DEPTHS if depth < top_k), top_k]


def figures(results: Sequence[SetResult], *, top_k: int, seed: int) -> list[Figures]:
    """Average each set over its queries, then the sets, unweighted, as "mean".

    The interval of the mean comes from resampling the queries within every set.
    """
    resampled = [
        {measure: resampled_means(result.gains(measure), seed=seed, name=result.name) for measure in MEASURES}
        for result in results
    ]
    of_sets = [
        _figures(
            result.name,
            [result],
            first_stage={measure: mean(result.first_stage, measure) for measure in MEASURES},
            reranked={measure: mean(result.reranked, measure) for measure in MEASURES},
            resampled=means,
            ceiling=mean(result.first_stage, f"Recall@{top_k}"),
            by_depth=result.by_depth,
        )
        for result, means in zip(results, resampled, strict=True)
    ]
    mean_of_sets = _figures(
        "mean",
        results,
        first_stage=_average([of_set.first_stage for of_set in of_sets]),
        reranked=_average([of_set.reranked for of_set in of_sets]),
        resampled={measure: np.mean([means[measure] for means in resampled], axis=0) for measure in MEASURES},
        ceiling=float(np.mean([of_set.ceiling for of_set in of_sets])),
        by_depth={depth: _average([of_set.by_depth[depth] for of_set in of_sets]) for depth in depths(top_k)},
    )
    return [*of_sets, mean_of_sets]


def _average(values: Sequence[Values]) -> Values:
    return {measure: float(np.mean([value[measure] for value in values])) for measure in MEASURES}


def _figures(
    name: str,
    results: Sequence[SetResult],
    *,
    first_stage: Values,
    reranked: Values,
    resampled: Mapping[str, NDArray[np.float64]],
    ceiling: float,
    by_depth: Mapping[int, Values],
) -> Figures:
    """Add what is counted over all queries and pairs of the results."""
    gains = [gain for result in results for gain in result.gains("nDCG@10")]
    probabilities = [probability for result in results for probability in result.probabilities]
    labels = [label for result in results for label in result.labels]
    return Figures(
        name=name,
        queries=len(gains),
        passages=sum(result.passages for result in results),
        first_stage=first_stage,
        reranked=reranked,
        gain={measure: interval(reranked[measure] - first_stage[measure], resampled[measure]) for measure in MEASURES},
        ceiling=ceiling,
        wins=sum(gain > 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
        by_depth=by_depth,
        reliability=reliability(probabilities, labels) if labels else None,
    )


def timing(results: Sequence[SetResult], latencies: Mapping[int, float]) -> dict[str, Any]:
    """Describe for JSON how long reranking took; `latencies` are median seconds by number of candidates."""
    return {
        "mistral-rerank": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "median_seconds_of_a_query_by_depth": dict(latencies),
        "sets": {
            result.name: {
                "pairs": len(result.labels),
                "seconds": sum(result.seconds),
                "pairs_per_second": len(result.labels) / sum(result.seconds) if sum(result.seconds) > 0 else None,
                "median_seconds_of_a_query": statistics.median(result.seconds),
            }
            for result in results
        },
    }
