"""Timing that holds on a machine that others use too: baselines take turns, and medians are compared."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from mistral_rerank.benchmark.baselines import Baseline
    from mistral_rerank.reranker import Pair


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one baseline.

    Attributes:
        name: of the baseline.
        seconds: of each round.
        logits: of the last round.

    """

    name: str
    seconds: tuple[float, ...]
    logits: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)


def take_turns(baselines: Sequence[Baseline], pairs: Sequence[Pair], *, rounds: int) -> list[Timing]:
    """Time every baseline once per round, after a first round that does not count."""
    seconds: list[list[float]] = [[] for _ in baselines]
    logits: list[list[float]] = [[] for _ in baselines]
    for _ in range(rounds + 1):
        for place, baseline in enumerate(baselines):
            start = time.perf_counter()
            logits[place] = baseline.score(pairs)
            seconds[place].append(time.perf_counter() - start)
    return [
        Timing(baseline.name, tuple(taken[1:]), tuple(found))
        for baseline, taken, found in zip(baselines, seconds, logits, strict=True)
    ]


def latencies(score: Callable[[Sequence[Pair]], object], calls: Sequence[Sequence[Pair]]) -> tuple[float, float]:
    """Time one call after another: the median and the 95th percentile, in seconds."""
    taken = []
    for call in calls:
        start = time.perf_counter()
        score(call)
        taken.append(time.perf_counter() - start)
    slow = statistics.quantiles(taken, n=20, method="inclusive")[-1] if len(taken) > 1 else taken[0]
    return statistics.median(taken), slow


def matmul_peak(
    shapes: Sequence[tuple[int, int]], *, rows: int, dtype: torch.dtype, device: torch.device, seconds: float = 1.0
) -> float:
    """Measure what this machine multiplies at best at a model's own shapes, in operations a second.

    Args:
        shapes: (outputs, inputs) of the linear layers.
        rows: tokens of a batch.
        dtype: of both factors.
        device: where to multiply.
        seconds: how long to try; the best pass over all shapes counts.

    """
    import torch

    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs = {width: torch.randn(rows, width, device=device).to(dtype) for _, width in shapes}
    work = sum(2 * rows * outputs * width for outputs, width in shapes)
    best, run_start = float("inf"), time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - run_start < seconds or best == float("inf"):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if device.type == "cuda":  # its products are queued, not done
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return work / best
