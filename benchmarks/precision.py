"""How far lower precision moves mini's logits, by the length of the input.

    python benchmarks/precision.py [--lengths 170 1100 8000] [--pairs 4] [--dtypes bfloat16 float16]

Each pair is a question of core/mistral_rerank/demo/facts with passages of it, joined until the input has that many
tokens. Prints the mean and the largest difference between the logits and those in float32.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version

from mistral_rerank import LocalReranker
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[170, 1100, 8000], help="tokens of an input")
    parser.add_argument("--pairs", type=int, default=4, help="of each length")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16"])
    options = parser.parse_args()
    facts = load_beir(FACTS)
    texts, queries = list(facts.corpus.values()), list(facts.queries.values())[: options.pairs]
    pairs = [(query, " ".join(texts[7 * n :] + texts * 8)) for n, query in enumerate(queries)]
    print(f"mini on a CPU, {platform.machine()}, torch {version('torch')}, transformers {version('transformers')}\n")
    print("| tokens | dtype | logit in float32 | mean difference | largest difference | seconds in float32 | seconds |")
    print("|---|---|---|---|---|---|---|")
    for length in options.lengths:
        exact, usual = scored(pairs, "float32", length)
        for dtype in options.dtypes:
            logits, seconds = scored(pairs, dtype, length)
            differences = [abs(a - b) for a, b in zip(logits, exact, strict=True)]
            mean = sum(exact) / len(exact)
            print(
                f"| {length} | {dtype} | {mean:+.3f} (mean) | "
                f"{sum(differences) / len(differences):.4f} | {max(differences):.4f} "
                f"| {usual:.1f} | {seconds:.1f} |",
                flush=True,
            )


def scored(pairs: list[tuple[str, str]], dtype: str, length: int) -> tuple[list[float], float]:
    """Give the logits of the pairs, cut to so many tokens, and the seconds they took."""
    with LocalReranker("mini", device="cpu", dtype=dtype, max_length=length) as reranker:
        reranker.warmup()
        start = time.perf_counter()
        scores = reranker.score_pairs(pairs)
        assert {score.tokens for score in scores} == {length}
        return [score.logit for score in scores], time.perf_counter() - start


if __name__ == "__main__":
    main()
