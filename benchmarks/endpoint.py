"""An endpoint in NVIDIA's protocol on loopback, in a process of its own, without a model: the longest passage wins."""

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "nvidia/llama-nemotron-rerank-1b-v2"
PER_PASSAGES = 32


class Handler(BaseHTTPRequestHandler):
    """Waits as a model would work, then ranks by length."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def do_POST(self) -> None:
        """Answer a ranking request."""
        passages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["passages"]
        time.sleep(self.server.seconds * -(-len(passages) // PER_PASSAGES))
        rows = [{"index": index, "logit": len(passage["text"]) / 50} for index, passage in enumerate(passages)]
        self._answer({"rankings": sorted(rows, key=lambda row: -row["logit"])})

    def do_GET(self) -> None:
        """List the model."""
        self._answer({"object": "list", "data": [{"id": MODEL, "object": "model", "root": MODEL}]})

    def _answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes as many connections as the clients open at once."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seconds = seconds


def serve(pipe: Any, seconds: float) -> None:
    """Serve on a free port and tell which."""
    with Server(seconds) as server:
        pipe.send(server.server_port)
        server.serve_forever()


@contextmanager
def endpoint(seconds: float = 0.0) -> Iterator[str]:
    """Serve; yields the base URL, with /v1.

    Args:
        seconds: that a request takes for every 32 passages.

    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, seconds), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.terminate()
        process.join()
