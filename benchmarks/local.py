"""Print the tables of docs/benchmarks.md: scoring on a CPU, beside other libraries on the same weights and texts.

Of mini; of its shape with the question first in the prompt, as NVIDIA's has it, so that passages share it; and of
four layers of Mistral-7B's width. The weights of the last two are random: speed depends on shapes, not on sense. It
takes about half an hour on two cores that have nothing else to do, and 4 GB.

python benchmarks/local.py [--rounds 5] [--model mini] [--model question-first] [--model full-width]
"""

import argparse
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from full_size import write_apart

from mistral_rerank.benchmark.baselines import Ours, Transformers
from mistral_rerank.benchmark.bench import bench, kendall_tau
from mistral_rerank.benchmark.workloads import SHAPES as LENGTHS
from mistral_rerank.benchmark.workloads import make_pairs
from mistral_rerank.cli.bench import print_report
from mistral_rerank.local.checkpoints.export import export_merged
from mistral_rerank.local.model.quantization import multiplies_bytes
from mistral_rerank.local.reranker import LocalReranker

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
BESIDE = [
    ("ours", "the loop in float32"),
    ("the loop, 16 rows", "the loop in float32"),
    ("the loop, 16 rows", "the loop, 1 row"),
    ("ours", "the loop, 16 rows"),
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
    """Print the memory over many calls of mini, and what a score from the cache costs."""
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
    """Print how far bfloat16 takes mini's scores, ours and a plain loop's, from float32 and from one another."""
    with tempfile.TemporaryDirectory() as scratch:
        merged = Path(scratch) / "merged"
        export_merged("mini", merged)
        reranker = LocalReranker(str(merged), device="cpu", dtype="bfloat16")
        baselines = {
            "ours": Ours(reranker),
            "the loop, 16 rows": Transformers(merged, torch.bfloat16),
            "the loop, 1 row": Transformers(merged, torch.bfloat16, rows=1),
            "the loop in float32": Transformers(merged, torch.float32),
        }
        print(f"\nmini in bfloat16: {'':38}  tau    max diff  max diff / max(1, |logit|)")
        for workload in ("nq", "hotpotqa", "fiqa"):
            pairs = make_pairs(LENGTHS[workload], questions=1, passages=100)
            logits = {name: baseline.score(pairs) for name, baseline in baselines.items()}
            for one, other in BESIDE:
                apart = [(abs(a - b), max(1, abs(b))) for a, b in zip(logits[one], logits[other], strict=True)]
                far, relative = max(a for a, _ in apart), max(a / size for a, size in apart)
                tau = kendall_tau(logits[one], logits[other])
                print(f"{workload:9} {one + ' beside ' + other:46}  {tau:.3f}  {far:<8.2g}  {relative:.2g}")
        reranker.close()


def main() -> None:
    """Measure one model after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", action="append", choices=PASSAGES)
    options = parser.parse_args()
    for name in options.model or PASSAGES:
        with tempfile.TemporaryDirectory() as scratch:
            if name in SHAPES:
                write_apart(scratch, **SHAPES[name])
            of_model = {"name": name, "folder": scratch, "passages": PASSAGES[name], "rounds": options.rounds}
            measure("the default dtype", against=BASELINES, **of_model)
            if multiplies_bytes():
                measure("int8", quantization="int8", workloads=["nq", "equal"], **of_model)
            if find_spec("bitsandbytes"):
                measure("nf4", quantization="nf4", workloads=["nq", "equal"], **of_model)
            if name != "full-width":  # float32 would take minutes a round there
                beside = ["sentence-transformers-float32"]
                measure("beside float32", against=beside, workloads=["nq"], **of_model)
            if name == "mini":
                many = of_model | {"passages": 100}
                measure("100 passages", against=BASELINES, workloads=["nq", "hotpotqa", "fiqa"], **many)
                measure(
                    "cascade depth 20 of 100 passages", cascade_depth=20, workloads=["nq", "hotpotqa", "fiqa"], **many
                )
                lower_precision()
                one = of_model | {"passages": 1, "rounds": 10 * options.rounds}
                measure("one pair, beside a bare forward", against=["transformers"], workloads=["nq"], **one)
                many_calls()


if __name__ == "__main__":
    main()
