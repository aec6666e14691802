"""Rerank at an HTTP endpoint instead of on this machine: backend="remote" is the one setting that changes.

    python examples/remote_endpoint.py http://nim:8000

Without an address, an endpoint that speaks NVIDIA's contract is started on this machine, with mini behind it:
pip install 'mistral-rerank[local,eval]'
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mistral_rerank import open_reranker
from mistral_rerank.evaluation.beir import load_beir
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.protocols import CONTRACTS, RerankReply


@contextmanager
def an_endpoint() -> Iterator[str]:
    """Serve mini on a free port of this machine; yields the base URL."""
    contract, reranker = CONTRACTS["nvidia"], open_reranker("mini", backend="local")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = contract.read_request(json.loads(body))
            ranking = reranker.rank(request.query, request.passages)
            content = json.dumps(contract.write_reply(request, RerankReply(tuple(ranking), "mini", "1"))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with reranker, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def compare(base_url: str) -> None:
    """Print how many questions the first passage answers before and after reranking."""
    facts = load_beir(Path(__file__).parent / "facts")
    found = BM25(facts.corpus).search(list(facts.queries.values()), k=10)
    before = after = 0
    with open_reranker("mini", backend="remote", base_url=base_url) as reranker:
        for (query_id, query), ranking in zip(facts.queries.items(), found, strict=True):
            (answer,) = facts.positives(query_id)
            passages = [passage_id for passage_id, _ in ranking]
            (best,) = reranker.rank(query, [facts.corpus[passage_id] for passage_id in passages], top_n=1)
            before += passages[0] == answer
            after += passages[best.index] == answer
    print(f"{reranker} answered")
    print(f"answered by the first passage: {before} of {len(found)} before, {after} after")


def main() -> None:
    """Ask the endpoint that is given, or one of our own."""
    if len(sys.argv) > 1:
        compare(sys.argv[1])
        return
    with an_endpoint() as base_url:
        compare(base_url)


if __name__ == "__main__":
    main()
