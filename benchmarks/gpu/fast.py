"""Stage 2: speed on this device, beside sentence-transformers and a plain transformers loop.

The same weights, texts and dtype for all. Baselines take turns. For each shape: passages of 512 tokens, 40 and 100 in a
call, and 100 passages of mixed lengths. `of peak` is the share of the card's own best large matrix product.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import Stage, synchronize
from shapes import SHAPES, passages_of, write_checkpoint

from mistral_rerank.benchmark.baselines import Baseline, Ours, SentenceTransformers, Transformers
from mistral_rerank.benchmark.bench import SHAPES as LENGTHS
from mistral_rerank.benchmark.bench import _Counter, _Linears, make_pairs
from mistral_rerank.benchmark.timing import alternate, kendall_tau, matmul_peak
from mistral_rerank.local.batching.packing import pack
from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint
from mistral_rerank.local.model import rerank_model
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.local.reranker import BATCH_TOKENS, LocalReranker
from mistral_rerank.reranker import Observer
from mistral_rerank.scores import Pair

SECONDS = {"4b": 75, "llama-1b": 32, "qwen3-0.6b": 34, "mini": 20}
"""The time that each shape needs, measured on an H200 for all but the last; a shape with less left is skipped."""
FLASH, PADDED = "mistral-rerank, packed", "mistral-rerank, padded"


def no_attention(*_: object) -> None:
    """Stand in for `row_attention`, so that batches are padded."""


class Contenders:
    """Everything that scores one checkpoint, each with the memory of the device that it takes.

    Attributes:
        baselines: what scores, our packed path first.
        memory: GiB of weights, by name.

    """

    def __init__(self, folder: str, stage: Stage) -> None:
        self.baselines: list[Baseline] = []
        self.memory: dict[str, float] = {}
        self.rerankers: list[LocalReranker] = []
        for name, attention in ((FLASH, rerank_model.row_attention), (PADDED, no_attention)):
            before = allocated(stage.device)
            with mock.patch.object(rerank_model, "row_attention", attention):
                reranker = LocalReranker(folder, device=str(stage.device), dtype="bfloat16")
                reranker.warmup()
            self.rerankers.append(reranker)
            self._add(Ours(reranker, name=name), before, stage.device)
        for kind in (SentenceTransformers, Transformers):
            before = allocated(stage.device)
            self._add(kind(Path(folder), torch.bfloat16, stage.device), before, stage.device)

    def _add(self, baseline: Baseline, before: float, device: torch.device) -> None:
        self.baselines.append(baseline)
        self.memory[baseline.name] = round(allocated(device) - before, 2)

    def close(self) -> None:
        """Free what the rerankers hold."""
        for reranker in self.rerankers:
            reranker.close()
        self.baselines.clear()


def allocated(device: torch.device, *, peak: bool = False) -> float:
    """Return the GiB that PyTorch has allocated on a card; 0 elsewhere."""
    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)) / 2**30


def measure(
    entry: dict[str, Any], contenders: Contenders, pairs: list[Pair], linears: _Linears, peak: float, rounds: int
) -> None:
    """Time all contenders on some pairs."""
    ours = contenders.rerankers[0]
    counted = _Counter()
    ours.observe(counted)
    tokens = sum(score.tokens or 0 for score in ours.score_pairs(pairs))
    ours.observe(Observer())
    timings = alternate(contenders.baselines, pairs, rounds=rounds)
    first = timings[0]
    for timing in timings:
        slow = statistics.quantiles(timing.seconds, n=20, method="inclusive")[-1]
        entry[timing.name] = {
            "p50 ms": round(1000 * timing.median, 1),
            "p95 ms": round(1000 * slow, 1),
            "pairs/s": round(len(pairs) / timing.median, 1),
            "x ours": round(timing.median / first.median, 2),
            "tau": round(kendall_tau(first.logits, timing.logits), 3),
        }
    entry["tokens"] = tokens
    entry["tokens/s"] = round(tokens / first.median)
    entry["computed/real"] = round(counted.tokens / tokens, 3)
    work = linears.operations(counted)
    entry["of peak"] = round(work / first.median / peak, 3)
    entry["floor ms"] = round(1000 * work / peak, 1)


def launches(stage: Stage, name: str, model: RerankModel) -> None:
    """Time one forward until all kernels are queued, and until they have run.

    If both times are equal, launches dominate, and CUDA graphs would help.
    """
    longest = 512 if stage.full else 24
    with stage.results.check(f"{name}: launches of a forward") as entry, torch.inference_mode():
        for count in (1, 8, 32):
            generator = torch.Generator().manual_seed(count)
            sequences = torch.randint(3, 2000, (count, longest), generator=generator).tolist()
            (batch,) = model.plan(sequences, BATCH_TOKENS["cuda"])
            packed, queued, done = pack(batch), [], []
            for _ in range(7):
                synchronize(stage.device)
                start = time.perf_counter()
                model._packed(packed)  # type: ignore[misc] # the caller has checked it
                queued.append(time.perf_counter() - start)
                synchronize(stage.device)
                done.append(time.perf_counter() - start)
            entry[f"{count} x {longest} tokens"] = {
                "queued ms": round(1000 * statistics.median(queued), 2),
                "done ms": round(1000 * statistics.median(done), 2),
            }


def shape(stage: Stage, name: str, peak: float) -> None:
    """Measure one shape."""
    with tempfile.TemporaryDirectory() as folder:
        with stage.results.check(f"{name}: load") as entry:
            write_checkpoint(name, Path(folder), stage.device, full=stage.full)
            contenders = Contenders(folder, stage)
            entry |= {baseline: {"weights GiB": gibibytes} for baseline, gibibytes in contenders.memory.items()}
        if not entry["ok"]:
            return
        linears = _Linears.of(folder, None)
        model = contenders.rerankers[0]._engine._stage.scorer.model  # type: ignore[union-attr]
        linears = replace(linears, last_token=linears.last_token and model._packed is not None)
        if model._packed is not None:
            launches(stage, name, model)
        tokenizer = load_tokenizer(open_checkpoint(folder))
        tokens = 512 if stage.full else 24
        workloads = {
            f"{passages} passages of {tokens} tokens": (
                passages_of(tokenizer, tokens, passages=passages, seed=0),
                rounds,
            )
            for passages, rounds in (((40, 10), (100, 5)) if stage.full else ((4, 2), (10, 2)))
        }
        passages = 100 if stage.full else 8
        workloads[f"{passages} passages of mixed lengths"] = (
            make_pairs(LENGTHS["nq"], questions=1, passages=passages),
            3 if stage.full else 2,
        )
        for workload, (pairs, rounds) in workloads.items():
            with stage.results.check(f"{name}: {workload}") as entry:
                if stage.full:
                    torch.cuda.reset_peak_memory_stats(stage.device)
                entry["packed"] = model._packed is not None
                measure(entry, contenders, pairs, linears, peak, rounds)
                entry["peak GiB, all weights included"] = round(allocated(stage.device, peak=True), 2)
        contenders.close()


def main() -> None:
    """Measure the peak, then one shape after another while there is time."""
    stage = Stage("fast")
    with stage.results.check("matrix peak") as entry:
        size = 8192 if stage.full else 256
        peak = matmul_peak([(size, size)], rows=size, dtype=torch.bfloat16, device=stage.device)
        entry["TFLOP/s in bfloat16"] = round(peak / 1e12, 3)
    for name in SHAPES:
        if stage.full and stage.seconds_left < SECONDS[name]:
            with stage.results.check(f"{name}: skipped") as entry:
                entry["ok"] = False
                entry["seconds left"] = round(stage.seconds_left)
            continue
        stage.attempt(shape, name, peak)


if __name__ == "__main__":
    main()
