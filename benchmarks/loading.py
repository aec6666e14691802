"""Measure the peak memory while a model is loaded and scores one pair, compared with the size of its weights.

The models have the first 16 layers of a sharded base with 32, alone or with a LoRA adapter on all linears. Memory is
the largest resident memory of a process of its own, over that after a tiny model of the same kind was loaded and freed.

python benchmarks/loading.py [whole adapter] [--width 1536]
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

from full_size import memory_gib, run_apart, write_checkpoint

LAYERS = 16
CASES = (
    ("whole", "bfloat16", "bfloat16"),
    ("whole", "bfloat16", "float32"),
    ("whole", "float32", "bfloat16"),
    ("adapter", "bfloat16", "bfloat16"),
    ("adapter", "bfloat16", "float32"),
    ("adapter", "float32", "bfloat16"),
)
"""What is loaded, in which dtype its weights are stored, and in which it runs."""


def write_model(folder: str, kind: str, stored: str, width: int) -> None:
    """Write a whole model of 16 layers, or an adapter and its base of 32 layers inside its folder."""
    shape = {"hidden_size": width, "intermediate_size": width * 8 // 3, "num_attention_heads": width // 64}
    shape |= {"num_key_value_heads": width // 64, "head_dim": 64}
    if kind == "whole":
        write_checkpoint(folder, stored, num_hidden_layers=LAYERS, **shape)
        return
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = Path(folder, "base")
    write_checkpoint(str(base), stored, num_hidden_layers=2 * LAYERS, **shape)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, num_hidden_layers=LAYERS)
    lora = LoraConfig(task_type="SEQ_CLS", r=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder, save_embedding_layers=False)
    settings = {"base": {"kind": "pretrained", "name": "base", "layers": LAYERS}}
    Path(folder, "rerank.json").write_text(json.dumps(settings), "utf-8")


def measure(tiny: str, folder: str, name: str, dtype: str) -> None:
    """Print a row of the table."""
    from mistral_rerank import open_reranker

    def load(model: str) -> None:
        with open_reranker(model, device="cpu", dtype=dtype) as reranker:
            reranker.warmup()

    load(tiny)
    gc.collect()
    before = memory_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # resets the largest resident memory
    load(folder)
    peak, weights = memory_gib() - before, weights_gib(folder, dtype)
    print(f"| {name} | {weights:.2f} GiB | {peak:.2f} GiB | {peak / weights:.2f} |", flush=True)


def weights_gib(folder: str, dtype: str) -> float:
    """Give the size of the weights that are used, in the dtype in which they run."""
    from mistral_rerank.local.checkpoints.summary import summary

    return float(summary(folder, device="cpu", dtype=dtype)["memory"].split()[0]) * 1e9 / 2**30


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["whole", "adapter"])
    parser.add_argument("--width", type=int, default=1536)
    options = parser.parse_args()
    print("| model | weights | peak memory | ratio |\n|---|--:|--:|--:|", flush=True)
    for kind, stored, dtype in [case for case in CASES if case[0] in options.kinds]:
        with tempfile.TemporaryDirectory() as scratch:
            folders = [str(Path(scratch) / name) for name in ("tiny", "model")]
            for folder, width in zip(folders, (64, options.width), strict=True):
                run_apart(write_model, folder, kind, stored, width)
            run_apart(measure, *folders, f"{kind}, {stored} on disk, {dtype} in memory", dtype)


if __name__ == "__main__":
    main()
