"""The benchmark of `mistral-rerank bench`: one row a workload, ours and the peers in the same rounds."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mistral_rerank.benchmark.baselines import Ours, open_baselines
from mistral_rerank.benchmark.timing import latencies, matmul_peak, take_turns
from mistral_rerank.benchmark.workloads import SHAPES, make_pairs
from mistral_rerank.errors import SettingsError
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.checkpoints.loading import open_checkpoint
from mistral_rerank.local.model.transformer import KNOWN_LAYERS
from mistral_rerank.local.reranker import BATCH_TOKENS, LocalReranker
from mistral_rerank.reranker import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.benchmark.baselines import Baseline
    from mistral_rerank.benchmark.timing import Timing
    from mistral_rerank.reranker import Quantization

PACKAGES = ("mistral-rerank", "torch", "transformers", "sentence-transformers")


@dataclass(frozen=True, slots=True)
class Against:
    """What a peer made of the same pairs.

    Attributes:
        name: of the peer.
        times_as_fast: its median time over ours.
        largest_difference: of two logits of a pair.
        kendall_tau: of the two orders of all pairs; 1 is the same order.

    """

    name: str
    times_as_fast: float
    largest_difference: float
    kendall_tau: float


@dataclass(frozen=True, slots=True)
class Row:
    """One workload.

    Attributes:
        workload: its name.
        pairs: how many pairs a round has.
        pairs_per_second: of the median round.
        tokens_per_second: tokens of the pairs, not of padding, in the median round.
        computed: tokens that were computed over tokens of the pairs; under 1 where pairs share what they begin with.
            In a cascade a token of the second pass counts twice.
        share_of_peak: operations of the linear layers a second, over what plain matrix products of these shapes reach
            here; what is left out of the last layer does not count. None on other devices than a CPU, and with
            quantization or cascade depth.
        against: the peers.

    """

    workload: str
    pairs: int
    pairs_per_second: float
    tokens_per_second: float
    computed: float
    share_of_peak: float | None
    against: tuple[Against, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `bench` prints.

    Attributes:
        machine: what ran where, in words.
        rows: the workloads.
        latency: passages of a call -> (median, 95th percentile) in seconds, on passages of the first workload.
        peak_memory: bytes resident at most in this process, peers included; None on Windows.

    """

    machine: dict[str, str]
    rows: tuple[Row, ...]
    latency: dict[int, tuple[float, float]]
    peak_memory: int | None


class _Computed(Observer):
    """Adds up the sequences and tokens that forwards compute."""

    def __init__(self) -> None:
        self.sequences = self.tokens = 0

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:  # noqa: ARG002 - the observer's form
        self.sequences += sequences
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class _Linears:
    """The linear layers of a checkpoint's backbone.

    Attributes:
        layer: (outputs, inputs) of those of a layer: queries, keys, values, and the others.
        layers: how many layers.
        ends: whether the last layer computes only keys and values for all tokens, as it does where the last one is
            pooled and the architecture is known.

    """

    layer: tuple[tuple[int, int], ...]
    layers: int
    ends: bool

    @classmethod
    def of(cls, model: str, base: str | None) -> _Linears:
        checkpoint = open_checkpoint(model, base=base)
        config = json.loads(((checkpoint.base or checkpoint.folder) / "config.json").read_text("utf-8"))
        width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        keys = head * config.get("num_key_value_heads", heads)
        attention = (head * heads, width), (keys, width), (keys, width), (width, head * heads)
        known = config["model_type"] in KNOWN_LAYERS and not checkpoint.config.pooling_config.mean
        layers = checkpoint.layers or config["num_hidden_layers"]
        return cls((*attention, (inner, width), (inner, width), (width, inner)), layers, known)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of all."""
        return [*self.layer] * self.layers

    def operations(self, counted: _Computed) -> int:
        """Count the multiplications and additions of some forwards on a CPU."""
        whole = sum(2 * outputs * inputs for outputs, inputs in self.layer)
        if not self.ends:
            return counted.tokens * self.layers * whole
        seen = sum(2 * outputs * inputs for outputs, inputs in self.layer[1:3])
        last = counted.tokens * seen + counted.sequences * (whole - seen)
        return counted.tokens * (self.layers - 1) * whole + last


def bench(
    model: str,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization | None = None,
    cascade_depth: int | None = None,
    workloads: Sequence[str] = tuple(SHAPES),
    against: Sequence[str] = (),
    rounds: int = 5,
    questions: int = 2,
    passages: int = 20,
    calls: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure a model on this machine.

    Args:
        model: "mini", a checkpoint folder or a hub id.
        base: under an adapter, as in `LocalReranker`.
        device: as in `LocalReranker`; peers run on a CPU alone.
        dtype: as in `LocalReranker`; peers get the same.
        quantization: as in `LocalReranker`, like the next one; the same model without both is a peer then, so that
            their price shows.
        cascade_depth: of each question.
        workloads: names of `SHAPES`.
        against: names of `BASELINES`.
        rounds: how often each baseline scores each workload; the median counts.
        questions: of a workload.
        passages: of a question.
        calls: how many calls each latency is taken from; 0 for none.
        progress: is told what is measured next.

    Raises:
        SettingsError: a name is not known, or peers are asked for on another device than a CPU.

    """
    if unknown := sorted(set(workloads) - SHAPES.keys()):
        raise SettingsError(f"{', '.join(unknown)}: not a workload; the workloads are {', '.join(SHAPES)}")
    prices: list[str] = [quantization] if quantization else []
    if cascade_depth is not None:
        prices.append(f"cascade depth {cascade_depth}")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        options: dict[str, Any] = {"base": base, "device": device, "dtype": dtype}
        opened = LocalReranker(model, **options, quantization=quantization, cascade_depth=cascade_depth)
        reranker = stack.enter_context(opened)
        if against and reranker.device.type != "cpu":
            raise SettingsError("peers are compared on a CPU alone; add --device cpu")
        merged = Path(scratch) / "merged"
        if against:
            export_merged(model, merged, base=base, dtype=str(reranker.dtype).removeprefix("torch."))
            # sentence-transformers would fill the chat template, and leave out the end token
            (merged / "chat_template.jinja").unlink()
        baselines: list[Baseline] = [Ours(reranker)]
        if prices:
            whole = stack.enter_context(LocalReranker(model, **options))
            baselines.append(Ours(whole, name=f"without {' and '.join(prices)}"))
        baselines += open_baselines(against, merged, reranker.dtype)
        linears = _Linears.of(model, base)
        peak = (
            matmul_peak(linears.shapes, rows=BATCH_TOKENS["cpu"], dtype=reranker.dtype)
            if reranker.device.type == "cpu" and not prices
            else None
        )
        rows = []
        for name in workloads:
            progress(name)
            pairs = make_pairs(SHAPES[name], questions=questions, passages=passages)
            counted = _Computed()
            reranker.observe(counted)
            tokens = sum(score.tokens or 0 for score in reranker.score_pairs(pairs))
            reranker.observe(Observer())
            ours, *others = take_turns(baselines, pairs, rounds=rounds)
            work = linears.operations(counted)
            rows.append(
                Row(
                    name,
                    len(pairs),
                    len(pairs) / ours.median,
                    tokens / ours.median,
                    counted.tokens / tokens,
                    None if peak is None else work / ours.median / peak,
                    tuple(_compare(ours, other) for other in others),
                )
            )
        latency = {}
        for size in (20, 100) if calls else ():
            progress(f"calls of {size} passages")
            made = [make_pairs(SHAPES[workloads[0]], questions=1, passages=size, seed=1 + n) for n in range(calls)]
            latency[size] = latencies(reranker.score_pairs, made)
        return Report(_machine(model, reranker, prices), tuple(rows), latency, _peak_memory())


def _compare(ours: Timing, other: Timing) -> Against:
    differences = [abs(a - b) for a, b in zip(ours.logits, other.logits, strict=True)]
    return Against(other.name, other.median / ours.median, max(differences), kendall_tau(ours.logits, other.logits))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Give the share of pairs of places that both put in one order, less that of those they put in opposite ones."""
    agreement = count = 0
    for i in range(len(first)):
        for j in range(i):
            product = (first[i] - first[j]) * (second[i] - second[j])
            agreement += (product > 0) - (product < 0)
            count += 1
    return agreement / count if count else 1.0


def _machine(model: str, reranker: LocalReranker, prices: Sequence[str]) -> dict[str, str]:
    versions, dtype = [], str(reranker.dtype).removeprefix("torch.")
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return {
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "machine": f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {platform.system()}",
        "model": f"{model} on {reranker.device} in {', '.join((dtype, *prices))}",
    }


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
