"""The benchmark of `mistral-rerank bench`: ours and the baselines in the same rounds, on workloads of random words.

Speed depends on the lengths of texts, not on their meaning. Lengths are in words; a word has about 1.25 tokens. The
means of `nq`, `hotpotqa` and `fiqa` are those of the BEIR paper (arXiv 2104.08663, table 1).
"""

from __future__ import annotations

import os
import platform
import random
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mistral_rerank.benchmark.baselines import Ours, open_baselines
from mistral_rerank.benchmark.timing import alternate, kendall_tau, latencies, matmul_peak
from mistral_rerank.errors import SettingsError
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.checkpoints.loading import open_checkpoint
from mistral_rerank.local.checkpoints.model_config import read_model_config
from mistral_rerank.local.model.transformer import KNOWN_LAYERS, linear_shapes
from mistral_rerank.local.reranker import BATCH_TOKENS, LocalReranker
from mistral_rerank.reranker import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.benchmark.baselines import Baseline
    from mistral_rerank.benchmark.timing import Timing
    from mistral_rerank.reranker import Quantization
    from mistral_rerank.scores import Pair

PACKAGES = ("mistral-rerank", "torch", "transformers", "sentence-transformers")


WORDS = (  # noqa: SIM905 - easier to read than a list
    "water light night river stone paper music market engine window garden letter winter number people country "
    "system energy method result surface history language machine problem theory weather village teacher student "
    "doctor patient kitchen bridge island planet season animal forest metal signal pattern picture station captain "
    "the of and to in is that for it with as was on are by this from at which have not be an or their more after "
    "before under between large small early late found made given known used called moved built grew turned kept"
).split()


@dataclass(frozen=True, slots=True)
class Shape:
    """Length of the texts of a workload, in words.

    Attributes:
        question: words of a question.
        passage: mean words of a passage.
        sigma: standard deviation of the logarithm of a passage's length; 0 for equal lengths.

    """

    question: int
    passage: int
    sigma: float = 0.6


SHAPES = {
    "nq": Shape(9, 79),
    "hotpotqa": Shape(18, 46),
    "fiqa": Shape(11, 132),
    "long-question": Shape(240, 120),
    "equal": Shape(10, 100, sigma=0.0),
}


def make_pairs(shape: Shape, *, questions: int, passages: int, seed: int = 0) -> list[Pair]:
    """Give the pairs of each question with its passages, one question after another."""
    rng = random.Random(seed)  # noqa: S311 - sampling, not security
    pairs = []
    for _ in range(questions):
        question = " ".join(rng.choices(WORDS, k=shape.question))
        for _ in range(passages):
            factor = rng.lognormvariate(-(shape.sigma**2) / 2, shape.sigma)  # of mean 1
            words = max(1, round(shape.passage * factor))
            pairs.append((question, " ".join(rng.choices(WORDS, k=words))))
    return pairs


@dataclass(frozen=True, slots=True)
class Comparison:
    """A baseline compared with ours on the same pairs.

    Attributes:
        name: of the baseline.
        times_as_fast: its median time divided by ours.
        largest_difference: of two logits of a pair.
        kendall_tau: of the two orders of all pairs.

    """

    name: str
    times_as_fast: float
    largest_difference: float
    kendall_tau: float


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one workload.

    Attributes:
        workload: its name.
        pairs: number of pairs of a round.
        pairs_per_second: of the median round.
        tokens_per_second: tokens of the pairs, without padding, in the median round.
        computed: computed tokens per token of the pairs; under 1 if pairs share a prefix. In a cascade a token of the
            second pass counts twice.
        share_of_peak: throughput of the linear layers divided by `matmul_peak`; work that the last layer skips does
            not count. None on other devices than a CPU, and with quantization or cascade depth.
        against: the baselines.

    """

    workload: str
    pairs: int
    pairs_per_second: float
    tokens_per_second: float
    computed: float
    share_of_peak: float | None
    against: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `bench` prints.

    Attributes:
        machine: versions, machine and model, in words.
        rows: the workloads.
        latency: passages of a call -> (median, 95th percentile) in seconds, on passages of the first workload.
        peak_memory: peak resident memory of this process in bytes, baselines included; None on Windows.

    """

    machine: dict[str, str]
    rows: tuple[Row, ...]
    latency: dict[int, tuple[float, float]]
    peak_memory: int | None


class _Counter(Observer):
    """Counts the sequences and tokens that forwards compute."""

    def __init__(self) -> None:
        self.sequences = self.tokens = 0

    def ran_batch(self, sequences: int, tokens: int, seconds: float) -> None:  # noqa: ARG002 - the observer's form
        self.sequences += sequences
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class _Linears:
    """The linear layers of a checkpoint's backbone.

    Attributes:
        layer: (outputs, inputs) of those of a layer.
        layers: number of layers.
        last_token: whether the last layer computes only keys and values for all tokens.

    """

    layer: list[tuple[int, int]]
    layers: int
    last_token: bool

    @classmethod
    def of(cls, model: str, base: str | None) -> _Linears:
        checkpoint = open_checkpoint(model, base=base)
        config = read_model_config(checkpoint.base or checkpoint.folder, layers=checkpoint.layers)
        last_token = config.model_type in KNOWN_LAYERS and not checkpoint.config.pooling_config.mean
        return cls(linear_shapes(config), config.num_hidden_layers, last_token)

    def operations(self, counter: _Counter) -> int:
        """Count the multiplications and additions of the counted forwards on a CPU."""
        layer = sum(2 * outputs * inputs for outputs, inputs in self.layer)
        if not self.last_token:
            return counter.tokens * self.layers * layer
        keys_and_values = sum(2 * outputs * inputs for outputs, inputs in self.layer[1:3])
        last_layer = counter.tokens * keys_and_values + counter.sequences * (layer - keys_and_values)
        return counter.tokens * (self.layers - 1) * layer + last_layer


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
        base: of an adapter, as in `LocalReranker`, like the next four.
        device: of the baselines too, like `dtype`.
        dtype: likewise.
        quantization: with it or `cascade_depth`, the same model without both is a baseline.
        cascade_depth: of each question.
        workloads: names of `SHAPES`.
        against: names of `BASELINES`.
        rounds: measured rounds of each workload; the median counts.
        questions: of a workload.
        passages: of a question.
        calls: number of calls that each latency is taken from; 0 for none.
        progress: receives the name of the next measurement.

    Raises:
        SettingsError: a name is not known.

    """
    if unknown := sorted(set(workloads) - SHAPES.keys()):
        raise SettingsError(f"{', '.join(unknown)}: not a workload; the workloads are {', '.join(SHAPES)}")
    variants: list[str] = [quantization] if quantization else []
    if cascade_depth is not None:
        variants.append(f"cascade depth {cascade_depth}")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        options: dict[str, Any] = {"base": base, "device": device, "dtype": dtype}
        reranker = stack.enter_context(
            LocalReranker(model, **options, quantization=quantization, cascade_depth=cascade_depth)
        )
        merged = Path(scratch) / "merged"
        if against:
            export_merged(model, merged, base=base, dtype=str(reranker.dtype).removeprefix("torch."))
            # sentence-transformers would fill the chat template, and leave out the end token
            (merged / "chat_template.jinja").unlink()
        baselines: list[Baseline] = [Ours(reranker)]
        if variants:
            plain = stack.enter_context(LocalReranker(model, **options))
            baselines.append(Ours(plain, name=f"without {' and '.join(variants)}"))
        baselines += open_baselines(against, merged, reranker.dtype, reranker.device)
        linears = _Linears.of(model, base)
        peak = None
        if reranker.device.type == "cpu" and not variants:
            peak = matmul_peak(
                linears.layer * linears.layers, rows=BATCH_TOKENS["cpu"], dtype=reranker.dtype, device=reranker.device
            )
        rows = []
        for name in workloads:
            progress(name)
            pairs = make_pairs(SHAPES[name], questions=questions, passages=passages)
            counter = _Counter()
            reranker.observe(counter)
            tokens = sum(score.tokens or 0 for score in reranker.score_pairs(pairs))
            reranker.observe(Observer())
            ours, *others = alternate(baselines, pairs, rounds=rounds)
            rows.append(
                Row(
                    name,
                    len(pairs),
                    len(pairs) / ours.median,
                    tokens / ours.median,
                    counter.tokens / tokens,
                    None if peak is None else linears.operations(counter) / ours.median / peak,
                    tuple(_compare(ours, other) for other in others),
                )
            )
        latency = {}
        for size in (20, 100) if calls else ():
            progress(f"calls of {size} passages")
            shape = SHAPES[workloads[0]]
            inputs = [make_pairs(shape, questions=1, passages=size, seed=1 + n) for n in range(calls)]
            latency[size] = latencies(reranker.score_pairs, inputs)
        return Report(_machine(model, reranker, variants), tuple(rows), latency, _peak_memory())


def _compare(ours: Timing, other: Timing) -> Comparison:
    differences = [abs(a - b) for a, b in zip(ours.logits, other.logits, strict=True)]
    tau = kendall_tau(ours.logits, other.logits)
    return Comparison(other.name, other.median / ours.median, max(differences), tau)


def _machine(model: str, reranker: LocalReranker, variants: Sequence[str]) -> dict[str, str]:
    versions, dtype = [], str(reranker.dtype).removeprefix("torch.")
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return {
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "machine": f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {platform.system()}",
        "model": f"{model} on {reranker.device} in {', '.join((dtype, *variants))}",
    }


def _peak_memory() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
