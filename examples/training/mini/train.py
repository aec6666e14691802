"""Train mini on one GPU: LoRA on all linear layers, groups of questions and passages, for a given time.

python train.py --base FOLDER --init ADAPTER --groups FILE [--groups FILE ...] --out FOLDER --seconds N

A row is a passage with all questions of its group: each question attends to the passage and to itself, so a passage is
computed once for all of them. Files of groups are read one after the other; the learning rate falls to zero with the
time. `--check` compares the logits with a plain forward.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional

from mistral_rerank.training.losses import FAR_BELOW, bce, distillation, infonce

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SCALING = 2.0
"""LoRA alpha over the rank, as in mini."""
MULTIPLE = 16
"""Rows are padded to a multiple of so many tokens."""
MOST_PASSAGE_TOKENS = 384
END = 2


class Collator:
    """Makes the padded rows of some groups, sorted by length, in micro-batches."""

    def __init__(self, tokenizer: str, micro_tokens: int) -> None:
        self._file, self._micro_tokens = tokenizer, micro_tokens
        self._tokenizer: Tokenizer | None = None

    def __call__(self, lines: list[str]) -> dict[str, Any]:
        """Return the micro-batches, and of every question the positions of its passages' logits, grades and teacher."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_file(self._file)
            self._tokenizer.encode_special_tokens = True
        groups = [json.loads(line) for line in lines]
        rows: list[tuple[list[int], list[list[int]]]] = []
        where: list[list[int]] = []
        for group in groups:
            prefixes = [f"Passage: {text.strip()}" for text in group["passages"]]
            suffixes = [f"\nQuestion: {text.strip()}" for text in group["queries"]]
            passages = [e.ids[:MOST_PASSAGE_TOKENS] for e in self._tokenizer.encode_batch(prefixes, add_special_tokens=False)]
            questions = [[*e.ids, END] for e in self._tokenizer.encode_batch(suffixes, add_special_tokens=False)]
            first = len(rows)
            rows += [(passage, questions) for passage in passages]
            where += [[first + row, number] for number in range(len(questions)) for row in range(len(passages))]  # type: ignore[list-item]
        lengths = [len(passage) + sum(map(len, questions)) for passage, questions in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        micro, start, place = [], 0, {}
        while start < len(order):
            end, longest = start + 1, lengths[order[start]]
            while end < len(order) and (end - start + 1) * lengths[order[end]] <= self._micro_tokens:
                longest = lengths[order[end]]
                end += 1
            chosen = order[start:end]
            width = -(-longest // MULTIPLE) * MULTIPLE
            ids = torch.zeros(len(chosen), width, dtype=torch.int64)
            positions = torch.zeros(len(chosen), width, dtype=torch.int64)
            segments = torch.full((len(chosen), width), -1, dtype=torch.int64)
            last = []
            for line, row in enumerate(chosen):
                passage, questions = rows[row]
                at = len(passage)
                ids[line, :at] = torch.tensor(passage)
                positions[line, :at] = torch.arange(at)
                segments[line, :at] = 0
                for number, question in enumerate(questions):
                    stop = at + len(question)
                    ids[line, at:stop] = torch.tensor(question)
                    positions[line, at:stop] = torch.arange(len(passage), len(passage) + len(question))
                    segments[line, at:stop] = number + 1
                    place[row, number] = len(place)
                    last.append(line * width + stop - 1)
                    at = stop
            micro.append((ids, positions, segments, torch.tensor(last)))
            start = end
        widest = max(len(group["passages"]) for group in groups)
        index, grades, teacher, taught, cursor = [], [], [], [], 0
        nan, question = float("nan"), 0
        for group in groups:
            count = len(group["passages"])
            for number in range(len(group["queries"])):
                cells = where[cursor : cursor + count]
                cursor += count
                index.append([place[tuple(cell)] for cell in cells] + [0] * (widest - count))
                grades.append([nan if g is None else g for g in group["grades"][number]] + [nan] * (widest - count))
                if group["teacher"] is not None:
                    teacher.append(group["teacher"][number] + [FAR_BELOW] * (widest - count))
                    taught.append(question)
                question += 1
        real = [[1.0] * len(group["passages"]) + [0.0] * (widest - len(group["passages"])) for group in groups for _ in group["queries"]]
        return {
            "micro": micro,
            "index": torch.tensor(index),
            "real": torch.tensor(real),
            "grades": torch.tensor(grades),
            "teacher": torch.tensor(teacher),
            "taught": torch.tensor(taught, dtype=torch.int64),
            "tokens": sum(lengths),
            "pairs": len(place),
        }


class Steps(torch.utils.data.IterableDataset[list[str]]):
    """The lines of each step, from files in order; a file that is not there yet is waited for. Workers share steps."""

    def __init__(self, files: list[Path], groups_per_step: int) -> None:
        self._files, self._size = files, groups_per_step

    def __iter__(self) -> Iterator[list[str]]:
        """Give the steps of one worker."""
        worker = torch.utils.data.get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for file in self._files:
            while not file.exists():
                time.sleep(0.5)
            lines = file.read_text("utf-8").splitlines()
            for at in range(first * self._size, len(lines), every * self._size):
                yield lines[at : at + self._size]


class Model(torch.nn.Module):
    """The lower layers of a Mistral with LoRA and a head; `forward` takes one micro-batch."""

    def __init__(self, base: Path, layers: int, rank: int, init: Path | None, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        config = json.loads((base / "config.json").read_text("utf-8"))
        self.heads, self.key_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.theta, self.layers, self.rank, self.dtype = config["rope_parameters"]["rope_theta"], layers, rank, dtype
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(base.glob("*.safetensors")):
            tensors |= load_file(file)
        self.weights = {name: t.to(device) for name, t in tensors.items() if _layer_of(name) < layers}
        self.start = load_file(init / "adapter_model.safetensors") if init else {}
        self.adapters = torch.nn.ParameterDict()
        torch.manual_seed(0)
        for layer in range(layers):
            for linear in LINEARS:
                name = f"layers.{layer}.{linear}"
                rows, columns = self.weights[f"model.{name}.weight"].shape
                down, up = torch.empty(rank, columns), torch.zeros(rows, rank)
                torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))
                key = f"base_model.model.model.{name}.lora_"
                if f"{key}A.weight" in self.start:
                    known = self.start[f"{key}A.weight"].shape[0]
                    down[:known] = self.start[f"{key}A.weight"].float()
                    up[:, :known] = self.start[f"{key}B.weight"].float()
                self.adapters[name.replace(".", "/") + "/A"] = torch.nn.Parameter(down.to(device))
                self.adapters[name.replace(".", "/") + "/B"] = torch.nn.Parameter(up.to(device))
        head = self.start.get("base_model.model.score.weight", torch.zeros(1, config["hidden_size"]))
        self.head = torch.nn.Parameter(head.float().to(device))
        self.frequencies = self.theta ** -(torch.arange(0, self.width, 2, device=device).float() / self.width)
        self.merged: dict[str, torch.Tensor] = {}

    def merge(self) -> None:
        """Add the LoRA updates to the weights for the next forwards; gradients pass through."""
        for layer in range(self.layers):
            for linear in LINEARS:
                name = f"layers.{layer}.{linear}"
                key = name.replace(".", "/")
                update = self.adapters[key + "/B"] @ self.adapters[key + "/A"]
                self.merged[name] = torch.add(self.weights[f"model.{name}.weight"].float(), update, alpha=SCALING).to(self.dtype)

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[f"model.{name}.weight"].to(self.dtype)
        return functional.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Return the logits at the `last` tokens, float32."""
        rows, length = ids.shape
        order = torch.arange(length, device=ids.device)
        seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = (seen & (order[None, :] <= order[:, None]))[:, None]
        angles = positions[..., None].float() * self.frequencies
        cosine = torch.cat([angles.cos()] * 2, -1)[:, None].to(self.dtype)
        sine = torch.cat([angles.sin()] * 2, -1)[:, None].to(self.dtype)
        hidden = functional.embedding(ids, self.weights["model.embed_tokens.weight"]).to(self.dtype)
        for layer in range(self.layers):
            name = f"layers.{layer}."
            normed = self._norm(hidden, name + "input_layernorm")
            query, key, value = (
                functional.linear(normed, self.merged[f"{name}self_attn.{part}_proj"])
                .view(rows, length, -1, self.width)
                .transpose(1, 2)
                for part in "qkv"
            )
            query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
            key, value = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (key, value))
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
            hidden = hidden + functional.linear(mixed, self.merged[name + "self_attn.o_proj"])
            normed = self._norm(hidden, name + "post_attention_layernorm")
            gated = functional.silu(functional.linear(normed, self.merged[name + "mlp.gate_proj"]))
            gated = gated * functional.linear(normed, self.merged[name + "mlp.up_proj"])
            hidden = hidden + functional.linear(gated, self.merged[name + "mlp.down_proj"])
        pooled = self._norm(hidden.view(rows * length, -1)[last], "norm")
        return functional.linear(pooled.float(), self.head)[:, 0]

    def save(self, folder: Path) -> None:
        """Write the adapter in bfloat16 as PEFT does, in two files of at most 16 MiB."""
        tensors: dict[str, torch.Tensor] = {}
        for key, weight in self.adapters.items():
            name, part = key.replace("/", ".").rsplit(".", 1)
            tensors[f"base_model.model.model.{name}.lora_{part}.weight"] = weight.detach().bfloat16().contiguous().cpu()
        tensors["base_model.model.score.weight"] = self.head.detach().float().contiguous().cpu()
        halves: tuple[dict[str, torch.Tensor], ...] = {}, {}
        for name, tensor in tensors.items():
            halves[_layer_of(name) >= self.layers // 2][name] = tensor
        folder.mkdir(parents=True, exist_ok=True)
        for number, half in enumerate(halves):
            file = folder / f"adapter-{number}.safetensors"
            save_file(half, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)


def _layer_of(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def _rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return states * cosine + torch.cat([-second, first], -1) * sine


def check(model: Model, batch: dict[str, Any], device: torch.device) -> float:
    """Return the largest difference between the logits of the rows and of pairs, one at a time."""
    worst = 0.0
    with torch.no_grad():
        model.merge()
        ids, positions, segments, last = (t.to(device) for t in batch["micro"][0])
        logits, cursor = model(ids, positions, segments, last), 0
        for row in range(min(3, len(ids))):
            for number in range(1, int(segments[row].max()) + 1):
                chosen = (segments[row] == 0) | (segments[row] == number)
                pair = ids[row][chosen][None]
                zeros, count = torch.zeros_like(pair), pair.shape[1]
                order = torch.arange(count, device=device)[None]
                alone = model(pair, order, zeros, torch.tensor([count - 1], device=device))
                worst = max(worst, float((alone[0] - logits[cursor]).abs()))
                cursor += 1
    return worst


def main() -> None:
    """Train until the time is over, and save every minute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--groups", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--groups-per-step", type=int, default=16)
    parser.add_argument("--micro-tokens", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--distill", type=float, default=1.0)
    parser.add_argument("--bce", type=float, default=0.5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.monotonic()
    model = Model(options.base, options.layers, options.rank, options.init, device, dtype)
    collator = Collator(str(options.base / "tokenizer.json"), options.micro_tokens)
    loader = torch.utils.data.DataLoader(
        Steps(options.groups, options.groups_per_step),
        batch_size=None,
        collate_fn=collator,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=device.type == "cuda",
    )
    rates = ([*model.adapters.values()], options.learning_rate), ([model.head], 4 * options.learning_rate)
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": rate, "peak": rate} for weights, rate in rates],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    print(f"set up in {time.monotonic() - start:.0f} s", flush=True)
    begin = saved = time.monotonic()
    tokens = pairs = step = 0
    losses: list[float] = []
    kept: list[torch.Tensor] = []
    for batch in loader:
        if not step:
            print(f"largest difference from single pairs: {check(model, batch, device):.4f}", flush=True)
            begin = time.monotonic()
        gone = (time.monotonic() - begin) / options.seconds
        if gone >= 1:
            break
        factor = min(1.0, (step + 1) / 50) * max(0.02, 1 - gone)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        model.merge()
        logits = torch.cat([model(*(t.to(device, non_blocking=True) for t in micro)) for micro in batch["micro"]])
        grades, real = batch["grades"].to(device), batch["real"].to(device)
        table = logits[batch["index"].to(device)].masked_fill(real == 0, FAR_BELOW)
        terms = [options.bce * bce(table, grades), infonce(table, grades)]
        if len(batch["taught"]):
            terms.append(options.distill * distillation(table[batch["taught"].to(device)], batch["teacher"].to(device)))
        loss = torch.stack(terms).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kept.append(torch.stack([term.detach() for term in (*terms, loss)][:3] + [loss.detach()]) if len(terms) == 3 else torch.cat([torch.stack([t.detach() for t in terms]), torch.zeros(1, device=device), loss.detach()[None]]))
        tokens, pairs, step = tokens + batch["tokens"], pairs + batch["pairs"], step + 1
        if step % 25 == 0 or step == 5:
            recent = torch.stack(kept[-25:]).mean(0).tolist()
            losses.append(round(recent[3], 4))
            seconds = time.monotonic() - begin
            print(
                f"step {step}, {seconds:.0f} s, {tokens:,} tokens, {tokens / seconds:,.0f} a second, {pairs:,} pairs; "
                f"bce {recent[0]:.3f}, infonce {recent[1]:.3f}, distillation {recent[2]:.3f}; factor {factor:.2f}",
                flush=True,
            )
        if time.monotonic() - saved > 60:
            model.save(options.out)
            saved = time.monotonic()
    model.save(options.out)
    record = {"tokens": tokens, "pairs": pairs, "steps": step, "seconds": round(time.monotonic() - begin, 1), "losses": losses}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings["groups"] = [file.name for file in options.groups]
    (options.out / "training.json").write_text(json.dumps({"settings": settings, **record}, default=str), "utf-8")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
