"""Print how long an event loop waits while 16 threads and 100 tasks score at once, and whether scores are exact.

python benchmarks/event_loop.py [--model mini] [--calls 116]
"""

import argparse
import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from mistral_rerank import LocalReranker, Pair, Score
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir


async def together(reranker: LocalReranker, calls: list[list[Pair]]) -> tuple[list[list[Score]], list[float]]:
    """Make 16 calls from threads and the others from tasks; give their scores and the loop's gaps in seconds."""
    gaps: list[float] = []

    async def heartbeat() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - start - 0.001)

    beat = asyncio.create_task(heartbeat())
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(16) as pool:
        threads = [loop.run_in_executor(pool, reranker.score_pairs, call) for call in calls[:16]]
        scores = await asyncio.gather(*threads, *(reranker.ascore_pairs(call) for call in calls[16:]))
    beat.cancel()
    return scores, gaps


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--calls", type=int, default=116)
    options = parser.parse_args()
    facts = load_beir(FACTS)
    texts, queries = list(facts.corpus.values()), list(facts.queries.values())
    calls = [[(queries[n % 40], texts[(n + i) % len(texts)]) for i in range(1 + n % 5)] for n in range(options.calls)]
    with LocalReranker(options.model) as reranker:
        reranker.warmup()
        alone = [reranker.score_pairs(call) for call in calls]
        scores, gaps = asyncio.run(together(reranker, calls))
    print(f"{len(calls)} calls at once, {len(gaps)} heartbeats: longest gap {max(gaps) * 1000:.1f} ms, ", end="")
    print("scores exactly those of calls one by one" if scores == alone else "SCORES DIFFER")


if __name__ == "__main__":
    main()
