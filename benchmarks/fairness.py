"""Time small calls alone, beside a call of 1,000 passages, and beside one pair of 8,192 tokens.

python benchmarks/fairness.py [--model mini] [--clients 8] [--calls 4] [--batch-tokens N]

Each client scores 3 passages at a time. The other call is repeated until the clients are done. Times are wall-clock
time and, because that depends on what else the machine runs, CPU time of this process on one thread. `--model random`
is a Mistral of 4 layers of 256 with random weights. To compare versions, run the script with another `PYTHONPATH`.
"""

import argparse
import asyncio
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from mistral_rerank import LocalReranker, Pair

PASSAGE = "A denser liquid carries what floats on it: iron floats on mercury, and lead does too. Passage {}."
CALLS = {
    "alone": None,
    "beside 1,000 passages": [("what does iron float on", PASSAGE.format(number)) for number in range(1000)],
    "beside 8,192 tokens": [("what does iron float on", " ".join(PASSAGE.format(number) for number in range(600)))],
}


def write_random_model(folder: str) -> None:
    """Write a Mistral of 4 layers of 256 with random weights, and mini's tokenizer."""
    from transformers import MistralConfig, MistralForSequenceClassification

    from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint

    tokenizer = load_tokenizer(open_checkpoint("mini"))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        sliding_window=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    MistralForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path(folder, "rerank.json").write_text("{}", "utf-8")  # the defaults


async def measure(reranker: LocalReranker, other: list[Pair] | None, clients: int, calls: int) -> tuple[float, float]:
    """Return the p50 of small calls beside `other`, in seconds: wall-clock and CPU time."""
    times: list[tuple[float, float]] = []

    async def repeat(pairs: list[Pair]) -> None:
        while True:
            await reranker.ascore_pairs(pairs)

    async def client(number: int) -> None:
        for call in range(calls):
            pairs = [(f"question {number}", PASSAGE.format(f"{call}.{passage}")) for passage in range(3)]
            wall, cpu = time.perf_counter(), time.process_time()
            await reranker.ascore_pairs(pairs)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))

    background = None if other is None else asyncio.create_task(repeat(other))
    await asyncio.sleep(0.5)
    await asyncio.gather(*map(client, range(clients)))
    if background is not None:
        background.cancel()
    wall, cpu = zip(*times, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "transformers", "mistral-rerank")
    print(*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")
    print(f"{os.cpu_count()} CPUs, one thread; {options.model}, {options.clients} clients of 3 passages; p50")
    with tempfile.TemporaryDirectory() as folder:
        if (model := options.model) == "random":
            write_random_model(model := folder)
        with LocalReranker(model, device="cpu", dtype="float32", batch_tokens=options.batch_tokens) as reranker:
            reranker.warmup()
            baseline = 0.0
            for name, other in CALLS.items():
                wall, cpu = asyncio.run(measure(reranker, other, options.clients, options.calls))
                baseline = baseline or cpu
                print(f"{name:24}{wall:8.2f} s{cpu:8.2f} s of CPU time{cpu / baseline:8.2f} x", flush=True)


if __name__ == "__main__":
    main()
