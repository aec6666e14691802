"""Rerank at an HTTP endpoint: `backend="remote"` replaces the local model.

    python examples/remote_endpoint.py http://nim:8000

Without a URL, it starts this package's server with mini on a free local port, as `mistral-rerank serve` does:
pip install 'mistral-rerank[local,serve,eval]'
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.server.app import create_app


@contextmanager
def local_endpoint() -> Iterator[str]:
    """Serve mini on a free local port; yields the base URL."""
    with open_reranker("mini", backend="local", share_batches=True) as reranker:
        server = uvicorn.Server(uvicorn.Config(create_app(reranker), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


def compare(base_url: str) -> None:
    """Print how many questions the first passage answers before and after reranking."""
    facts = load_beir(Path(__file__).parent / "facts")
    rankings = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    before = after = 0
    with open_reranker(backend="remote", base_url=base_url) as reranker:
        for (query_id, query), ranking in zip(facts.queries.items(), rankings, strict=True):
            (answer,) = facts.positives(query_id)
            passages = [passage_id for passage_id, _ in ranking]
            (best,) = reranker.rank(query, [facts.corpus[passage_id] for passage_id in passages], top_n=1)
            before += passages[0] == answer
            after += passages[best.index] == answer
    print(f"{reranker} answered")
    print(f"answered by the first passage: {before} of {len(rankings)} before, {after} after")


def main() -> None:
    """Use the endpoint of the command line, or a local one."""
    if len(sys.argv) > 1:
        compare(sys.argv[1])
        return
    with local_endpoint() as base_url:
        compare(base_url)


if __name__ == "__main__":
    main()
