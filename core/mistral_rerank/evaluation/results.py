"""Results of an evaluation: one value object per data set, and the figures that are printed and written."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.evaluation.metrics import MEASURES, Interval, interval, mean, resampled_means
from mistral_rerank.evaluation.reliability import Reliability, reliability

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mistral_rerank.evaluation.metrics import Values

DEPTHS = (2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True, slots=True)
class Shown:
    """A passage at the top of a ranking, shown in the report."""

    passage: str
    text: str
    grade: int | None
    """None if nobody judged it."""


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
        name: of the folder.
        passages: size of the corpus.
        first_stage: query id -> measure -> value, before reranking.
        reranked: the same after reranking.
        by_depth: number of candidates reranked -> measure -> mean; 0 is the first stage alone.
        probabilities: of every scored pair.
        labels: 1 where a passage is judged relevant, else 0.
        examples: the worst losses first, then the best gains.

    """

    name: str
    passages: int
    first_stage: Mapping[str, Values]
    reranked: Mapping[str, Values]
    by_depth: Mapping[int, Values]
    probabilities: tuple[float, ...]
    labels: tuple[int, ...]
    examples: tuple[Example, ...]

    def gains(self, measure: str) -> list[float]:
        """Give after minus before, for every query."""
        return [self.reranked[query][measure] - self.first_stage[query][measure] for query in self.reranked]


@dataclass(frozen=True, slots=True)
class Figures:
    """The means of a data set, or of all of them.

    Attributes:
        name: the set's, or "mean".
        queries: number of queries.
        passages: number of passages in the corpora.
        first_stage: measure -> mean.
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


@dataclass(frozen=True, slots=True)
class Timing:
    """Time that reranking took.

    Attributes:
        seconds: data set -> seconds of every query.
        pairs: data set -> number of scored pairs.
        latencies: number of candidates -> median seconds to rerank them.

    """

    seconds: Mapping[str, Sequence[float]]
    pairs: Mapping[str, int]
    latencies: Mapping[int, float]

    def record(self) -> dict[str, object]:
        """Give it for JSON, with versions and machine."""
        return {
            "mistral-rerank": version("mistral-rerank"),
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "median_seconds_of_a_query_by_depth": dict(self.latencies),
            "sets": {
                name: {
                    "pairs": self.pairs[name],
                    "seconds": sum(taken),
                    "pairs_per_second": self.pairs[name] / sum(taken) if sum(taken) > 0 else None,
                    "median_seconds_of_a_query": statistics.median(taken),
                }
                for name, taken in self.seconds.items()
            },
        }


def depths(top_k: int) -> list[int]:
    """Give the numbers of candidates in `by_depth`; 0 first, `top_k` last."""
    return [0, *(depth for depth in DEPTHS if depth < top_k), top_k]


def figures(results: Sequence[SetResult], *, top_k: int, seed: int) -> list[Figures]:
    """Average each set over its queries, then the sets, unweighted, as "mean".

    The interval of the mean comes from resampling the queries within every set.
    """
    of_sets, all_means = [], []
    for result in results:
        means = {measure: resampled_means(result.gains(measure), seed=seed, name=result.name) for measure in MEASURES}
        all_means.append(means)
        of_sets.append(_of_set(result, means, top_k))
    return [*of_sets, _average(results, of_sets, all_means)]


def _of_set(result: SetResult, means: Mapping[str, NDArray[np.float64]], top_k: int) -> Figures:
    before = {measure: mean(result.first_stage, measure) for measure in MEASURES}
    after = {measure: mean(result.reranked, measure) for measure in MEASURES}
    gains = result.gains("nDCG@10")
    return Figures(
        name=result.name,
        queries=len(result.reranked),
        passages=result.passages,
        first_stage=before,
        reranked=after,
        gain={measure: interval(after[measure] - before[measure], means[measure]) for measure in MEASURES},
        ceiling=mean(result.first_stage, f"Recall@{top_k}"),
        wins=sum(gain > 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
        by_depth=result.by_depth,
        reliability=reliability(result.probabilities, result.labels) if result.labels else None,
    )


def _average(
    results: Sequence[SetResult], of_sets: Sequence[Figures], means: Sequence[Mapping[str, NDArray[np.float64]]]
) -> Figures:
    def average(values: Sequence[Values]) -> Values:
        return {measure: float(np.mean([value[measure] for value in values])) for measure in MEASURES}

    before, after = average([f.first_stage for f in of_sets]), average([f.reranked for f in of_sets])
    pooled = [p for result in results for p in result.probabilities], [y for result in results for y in result.labels]
    return Figures(
        name="mean",
        queries=sum(f.queries for f in of_sets),
        passages=sum(f.passages for f in of_sets),
        first_stage=before,
        reranked=after,
        gain={
            measure: interval(after[measure] - before[measure], np.mean([m[measure] for m in means], axis=0))
            for measure in MEASURES
        },
        ceiling=float(np.mean([f.ceiling for f in of_sets])),
        wins=sum(f.wins for f in of_sets),
        losses=sum(f.losses for f in of_sets),
        by_depth={depth: average([f.by_depth[depth] for f in of_sets]) for depth in of_sets[0].by_depth},
        reliability=reliability(*pooled) if pooled[1] else None,
    )
