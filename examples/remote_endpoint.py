"""Rerank at an HTTP endpoint: `backend="remote"` replaces the local model.

    python examples/remote_endpoint.py http://nim:8000

Without a URL, it starts this package's server with mini on a free local port, as `mistral-rerank serve` does:
pip install '.[local,serve]'
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from mistral_rerank import open_reranker
from mistral_rerank.server.app import create_app

QUERY = "Why does ice float on water?"
PASSAGES = [
    "Warm water freezes into ice more slowly than cold water.",
    "Icebergs break off glaciers and drift with the current.",
    "Water expands as it freezes, so a block of ice is less dense than the liquid around it.",
]


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


def rank_at(base_url: str) -> None:
    """Print the passages in the endpoint's order."""
    with open_reranker(backend="remote", base_url=base_url) as reranker:
        print(f"{QUERY} Ranked by {reranker}:")
        for passage in reranker.rank(QUERY, PASSAGES):
            print(f"  {passage.score.probability:.2f}  was {passage.index + 1}  {passage.text}")


def main() -> None:
    """Use the endpoint of the command line, or a local one."""
    if len(sys.argv) > 1:
        rank_at(sys.argv[1])
        return
    with local_endpoint() as base_url:
        rank_at(base_url)


if __name__ == "__main__":
    main()
