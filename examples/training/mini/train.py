"""Train mini for a given time: LoRA on all linear layers, on groups of questions and passages.

python train.py --base FOLDER [--init ADAPTER] --groups FILE [--groups FILE ...] --out FOLDER --seconds N

Each question attends to the passage and to itself, so a passage is computed once for all questions of its group. Files
of groups are read in order, and then again; they may appear during training. The learning rate falls to zero with the
time. Weights are saved every minute, at the end, on an error, and on SIGTERM. `adapter.py` makes a checkpoint of them.
"""

import argparse
import json
import multiprocessing
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from model import Model
from rows import Batch, Collator, Steps

from mistral_rerank.training.losses import FAR_BELOW, bce, distillation, infonce

WARMUP_STEPS = 50
LOWEST_FACTOR = 0.02
"""Of the learning rate, at the end."""
REPORT_SECONDS = 5
SAVE_SECONDS = 60
MOST_SKIPPED = 20
"""Steps without a finite gradient; with more, training ends."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--groups", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of the whole run, set-up included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--groups-per-step", type=int, default=16)
    parser.add_argument("--micro-tokens", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches")
    parser.add_argument("--distill", type=float, default=1.0)
    parser.add_argument("--bce", type=float, default=0.5)
    return parser.parse_args()


def losses(model: Model, batch: Batch, options: argparse.Namespace) -> torch.Tensor:
    """Return the three weighted losses of a batch: bce, infonce and distillation."""
    device = model.head.device
    model.merge()
    logits = torch.cat([model(*(tensor.to(device, non_blocking=True) for tensor in rows)) for rows in batch.micro])
    real, grades = batch.real.to(device), batch.grades.to(device)
    table = logits[batch.index.to(device)].masked_fill(~real, FAR_BELOW)
    taught = logits.new_zeros(())
    if len(batch.taught):
        taught = options.distill * distillation(table[batch.taught.to(device)], batch.teacher.to(device))
    return torch.stack([options.bce * bce(table, grades), infonce(table, grades), taught])


def largest_difference(model: Model, batch: Batch, device: torch.device) -> float:
    """Return the largest difference between logits of the first three rows and of their pairs alone."""
    worst, cursor = 0.0, 0
    with torch.no_grad():
        model.merge()
        ids, positions, segments, last = (tensor.to(device) for tensor in batch.micro[0])
        logits = model(ids, positions, segments, last)
        for row in range(min(3, len(ids))):
            for number in range(1, int(segments[row].max()) + 1):
                pair = ids[row][(segments[row] == 0) | (segments[row] == number)][None]
                order = torch.arange(pair.shape[1], device=device)
                alone = model(pair, order[None], torch.zeros_like(pair), order[-1:])
                worst = max(worst, float((alone[0] - logits[cursor]).abs()))
                cursor += 1
    return worst


class Progress:
    """Prints and records the losses every few seconds, and saves the weights every minute."""

    def __init__(self, model: Model, options: argparse.Namespace) -> None:
        self._model, self._options = model, options
        self._reported = self._saved = self._start = time.monotonic()
        self._recent: list[torch.Tensor] = []
        self._losses: list[float] = []
        self.steps = self.tokens = self.pairs = 0

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return time.monotonic() - self._start

    def add(self, terms: torch.Tensor, batch: Batch) -> None:
        """Count a step."""
        self._recent.append(terms.detach())
        self.tokens, self.pairs, self.steps = self.tokens + batch.tokens, self.pairs + batch.pairs, self.steps + 1
        if self.steps > 1 and time.monotonic() - self._reported < REPORT_SECONDS:
            return
        means = torch.stack(self._recent).mean(0).tolist()
        self._losses.append(round(sum(means), 4))
        print(
            f"step {self.steps}, {self.seconds:.0f} s, {self.tokens:,} tokens, "
            f"{self.tokens / self.seconds:,.0f} a second, {self.pairs:,} pairs; "
            f"bce {means[0]:.3f}, infonce {means[1]:.3f}, distillation {means[2]:.3f}",
            flush=True,
        )
        self._reported = time.monotonic()
        self._recent.clear()
        if self._reported - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the weights and the record."""
        self._model.save(self._options.out)
        settings: dict[str, Any] = {
            name: value for name, value in vars(self._options).items() if not isinstance(value, Path | list)
        }
        settings["groups"] = [file.name for file in self._options.groups]
        record = {"steps": self.steps, "tokens": self.tokens, "pairs": self.pairs, "seconds": round(self.seconds, 1)}
        content = json.dumps({**record, "settings": settings, "losses": self._losses}, indent=1)
        (self._options.out / "training.json").write_text(content, "utf-8")
        self._saved = time.monotonic()


def main() -> None:
    """Train until the time is over."""
    end, options, stopped = time.monotonic(), parse(), threading.Event()
    end += options.seconds
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it is the default, and plans anew for every new shape
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loader = torch.utils.data.DataLoader(
        Steps(options.groups, options.groups_per_step),
        batch_size=None,
        collate_fn=Collator(options.base / "tokenizer.json", options.micro_tokens),
        num_workers=options.workers,
        multiprocessing_context="spawn" if options.workers else None,
        pin_memory=device.type == "cuda",
    )
    model = Model(options.base, options.layers, options.rank, options.init, device, dtype)
    rates = ([*model.adapters.values()], options.learning_rate), ([model.head], 4 * options.learning_rate)
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": rate, "peak": rate} for weights, rate in rates],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    progress: Progress | None = None
    skipped = 0
    try:
        for batch in loader:
            if progress is None:
                difference = largest_difference(model, batch, device)
                print(f"largest difference from pairs alone: {difference:.4f}", flush=True)
                progress = Progress(model, options)
            left = end - time.monotonic()
            if left <= 0 or stopped.is_set():
                break
            decay = left / (left + progress.seconds)
            factor = min(1.0, (progress.steps + 1) / WARMUP_STEPS) * max(LOWEST_FACTOR, decay)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            terms = losses(model, batch, options)
            optimizer.zero_grad(set_to_none=True)
            terms.sum().backward()
            if torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                optimizer.step()
                progress.add(terms, batch)
            elif (skipped := skipped + 1) > MOST_SKIPPED:
                raise FloatingPointError(f"{skipped} steps without a finite gradient; the losses are {terms.tolist()}")
    finally:
        if progress is not None and progress.steps:
            progress.save()
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():  # one that waits for a file would delay the exit
        worker.kill()


if __name__ == "__main__":
    main()
