"""Print the tables of docs/benchmarks.md: scoring on a CPU, compared with other libraries.

The models are mini; its architecture with the question first in the prompt, as NVIDIA's has it, so that passages share
it; and four layers of Mistral-7B's width. The weights of the last two are random: speed depends on shapes, not on
meaning. It takes about half an hour on two cores without other load, and 4 GB.

python benchmarks/local.py [--rounds 5] [--model mini] [--model question-first] [--model full-width]

With --against it compares this checkout with another one instead. Each has a process; both score the same pairs in
alternating rounds. `ratio` is the median over the rounds of the time there divided by the time here.

git worktree add ../before COMMIT
python benchmarks/local.py --against ../before [--rounds 5] [--model mini]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from full_size import run_apart, write_checkpoint

from mistral_rerank.benchmark.baselines import Ours, Transformers
from mistral_rerank.benchmark.bench import SHAPES as LENGTHS
from mistral_rerank.benchmark.bench import bench, make_pairs
from mistral_rerank.benchmark.timing import kendall_tau
from mistral_rerank.cli.models import print_report
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.model.quantization import multiplies_bytes
from mistral_rerank.local.reranker import LocalReranker
from mistral_rerank.scores import Pair

SHAPES = {
    "question-first": {
        "num_hidden_layers": 16,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "full-width": {"num_hidden_layers": 4},
}
PASSAGES = {"mini": 20, "question-first": 20, "full-width": 8}
BASELINES = ["sentence-transformers", "transformers"]
WORKER = """
import json, sys, time
from mistral_rerank import open_reranker
with open_reranker(sys.argv[1], backend="local", device="cpu") as reranker:
    for line in sys.stdin:
        pairs = [tuple(pair) for pair in json.loads(line)]
        start = time.perf_counter()
        reranker.score_pairs(pairs)
        print(time.perf_counter() - start, flush=True)
"""
COMPARED = [
    ("ours", "transformers loop in float32"),
    ("transformers loop, 16 rows", "transformers loop in float32"),
    ("transformers loop, 16 rows", "transformers loop, 1 row"),
    ("ours", "transformers loop, 16 rows"),
]


def measure(title: str, name: str, folder: str, *, passages: int, **settings: object) -> None:
    """Print one table."""
    model = folder if name in SHAPES else name
    report = bench(model, device="cpu", questions=1, passages=passages, calls=0, **settings)
    report.machine["model"] = report.machine["model"].replace(folder, name)
    print(f"\n{name}: {title}")
    print_report(report)


def memory_now() -> int:
    """Give the resident memory of this process in MiB."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


def many_calls(calls: int = 1000) -> None:
    """Print the memory over many calls of mini, and the time of a score from the cache."""
    with LocalReranker("mini", device="cpu", cache_size=1000) as reranker:
        memory = []
        for call in range(calls):
            reranker.score_pairs(make_pairs(LENGTHS["hotpotqa"], questions=1, passages=1 + call % 3, seed=call))
            if call % (calls // 8) == 0:
                memory.append(memory_now())
        print(f"\nmini: memory over {calls} calls of 1 to 3 passages, MiB:", *memory)
        pairs = make_pairs(LENGTHS["nq"], questions=1, passages=100)
        reranker.score_pairs(pairs)
        start = time.perf_counter()
        for _ in range(100):
            reranker.score_pairs(pairs)
        each = (time.perf_counter() - start) / 100 / len(pairs)
        print(f"mini: a score from the cache takes {1e6 * each:.1f} microseconds")


def lower_precision() -> None:
    """Print the differences of mini's scores in bfloat16 and float32, ours and those of a plain transformers loop."""
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        export_merged("mini", merged)
        reranker, cpu = LocalReranker(str(merged), device="cpu", dtype="bfloat16"), torch.device("cpu")
        baselines = {
            "ours": Ours(reranker),
            "transformers loop, 16 rows": Transformers(merged, torch.bfloat16, cpu),
            "transformers loop, 1 row": Transformers(merged, torch.bfloat16, cpu, rows=1),
            "transformers loop in float32": Transformers(merged, torch.float32, cpu),
        }
        print(f"\nmini in bfloat16: {'':62}  tau    max diff  max diff / max(1, |logit|)")
        for workload in ("nq", "hotpotqa", "fiqa"):
            pairs = make_pairs(LENGTHS[workload], questions=1, passages=100)
            logits = {name: baseline.score(pairs) for name, baseline in baselines.items()}
            for first, second in COMPARED:
                sizes = [(abs(a - b), max(1, abs(b))) for a, b in zip(logits[first], logits[second], strict=True)]
                largest = max(difference for difference, _ in sizes)
                relative = max(difference / size for difference, size in sizes)
                tau = kendall_tau(logits[first], logits[second])
                label = f"{first}, difference to {second}"
                print(f"{workload:9} {label:70}  {tau:.3f}  {largest:<8.2g}  {relative:.2g}")
        reranker.close()


def compare_checkouts(name: str, model: str, other: Path, rounds: int) -> None:
    """Print the speed of both checkouts on every workload, and the ratio."""
    with ExitStack() as stack:
        workers = []
        for checkout in (Path(__file__).parent.parent, other):
            environment = os.environ | {"PYTHONPATH": str(checkout.resolve(strict=True) / "core")}
            command = [sys.executable, "-c", WORKER, model]
            worker = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            workers.append(stack.enter_context(worker))
        print(f"\n{name}: pairs/s of this checkout and of {other}\n{'workload':13}  {'here':>8}  {'there':>8}  ratio")
        for workload, shape in LENGTHS.items():
            pairs = make_pairs(shape, questions=1, passages=PASSAGES[name])
            times = [[seconds(worker, pairs) for worker in workers] for _ in range(rounds + 1)][1:]
            here, there = (len(pairs) / median(column) for column in zip(*times, strict=True))
            ratio = median(b / a for a, b in times)
            print(f"{workload:13}  {here:8.2f}  {there:8.2f}  {ratio:.3f}", flush=True)


def seconds(worker: subprocess.Popen[str], pairs: list[Pair]) -> float:
    """Let a worker score pairs; give the seconds that it took."""
    worker.stdin.write(json.dumps(pairs) + "\n")
    return float(worker.stdout.readline())


def main() -> None:
    """Measure one model after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="append", choices=PASSAGES)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    options = parser.parse_args()
    for name in options.model or PASSAGES:
        with tempfile.TemporaryDirectory() as scratch:
            if name in SHAPES:
                run_apart(write_checkpoint, scratch, **SHAPES[name])
            if options.against:
                compare_checkouts(name, scratch if name in SHAPES else name, options.against, options.rounds)
                continue
            common = {"name": name, "folder": scratch, "passages": PASSAGES[name], "rounds": options.rounds}
            measure("the default dtype", against=BASELINES, **common)
            if multiplies_bytes():
                measure("int8", quantization="int8", workloads=["nq", "equal"], **common)
            if find_spec("bitsandbytes"):
                measure("nf4", quantization="nf4", workloads=["nq", "equal"], **common)
            if name != "full-width":  # float32 would take minutes a round there
                in_float32 = ["sentence-transformers-float32"]
                measure("against float32", against=in_float32, workloads=["nq"], **common)
            if name == "mini":
                many = common | {"passages": 100}
                measure("100 passages", against=BASELINES, workloads=["nq", "hotpotqa", "fiqa"], **many)
                measure(
                    "cascade depth 20 of 100 passages", cascade_depth=20, workloads=["nq", "hotpotqa", "fiqa"], **many
                )
                lower_precision()
                single = common | {"passages": 1, "rounds": 10 * options.rounds}
                measure("one pair, against a plain forward", against=["transformers"], workloads=["nq"], **single)
                many_calls()


if __name__ == "__main__":
    main()
