"""Timing on a machine with other load: baselines run in alternating rounds, and medians are compared."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.benchmark.baselines import Baseline
    from mistral_rerank.scores import Pair


@dataclass(frozen=True, slots=True)
class Timing:
    """The seconds of each round of one baseline, and the logits of the last round."""

    name: str
    seconds: tuple[float, ...]
    logits: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)


def alternate(baselines: Sequence[Baseline], pairs: Sequence[Pair], *, rounds: int) -> list[Timing]:
    """Time every baseline once per round, after a warm-up round that does not count."""
    seconds: list[list[float]] = [[] for _ in baselines]
    logits: list[list[float]] = [[] for _ in baselines]
    for _ in range(rounds + 1):
        for index, baseline in enumerate(baselines):
            start = time.perf_counter()
            logits[index] = baseline.score(pairs)
            seconds[index].append(time.perf_counter() - start)
    return [
        Timing(baseline.name, tuple(times[1:]), tuple(last_logits))
        for baseline, times, last_logits in zip(baselines, seconds, logits, strict=True)
    ]


def latencies(score: Callable[[Sequence[Pair]], object], calls: Sequence[Sequence[Pair]]) -> tuple[float, float]:
    """Time one call after another: the median and the 95th percentile, in seconds."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        score(call)
        seconds.append(time.perf_counter() - start)
    p95 = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    return statistics.median(seconds), p95


def matmul_peak(
    shapes: Sequence[tuple[int, int]], *, rows: int, dtype: torch.dtype, device: torch.device, seconds: float = 1.0
) -> float:
    """Measure the matrix multiplication throughput of this machine, in operations a second: the best of many passes.

    Args:
        shapes: (outputs, inputs) of the linear layers.
        rows: tokens of a batch.
        dtype: of both factors.
        device: where to multiply.
        seconds: duration of the measurement; one pass at least.

    """
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    inputs = {width: torch.randn(rows, width, device=device).to(dtype) for _, width in shapes}
    operations = sum(2 * rows * outputs * width for outputs, width in shapes)
    best, run_start = float("inf"), time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - run_start < seconds or best == float("inf"):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if device.type == "cuda":  # products are queued; wait for them
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return operations / best


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Give Kendall's tau-a of two scorings of the same pairs: 1 for one order, -1 for opposite orders."""
    scores = torch.tensor([first, second], dtype=torch.float64)
    signs = (scores[:, :, None] - scores[:, None, :]).sign()
    comparisons = len(first) * (len(first) - 1)
    return float((signs[0] * signs[1]).sum()) / comparisons if comparisons else 1.0
