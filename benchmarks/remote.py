"""Compare the remote backend with NVIDIA's LangChain reranker, on one loopback server that speaks their protocol.

python benchmarks/remote.py [--runs 7]

The server is another process; it takes 50 ms for every 32 passages of a request, and serves requests at once.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any

import httpx
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank

from langchain_mistral_rerank import MistralRerank
from mistral_rerank.protocols import PROTOCOLS, RerankRequest

MODEL = "nvidia/llama-nemotron-rerank-1b-v2"
SECONDS, PER_PASSAGES = 0.050, 32
TEXT = "Ice floats on water because it is about nine percent less dense than the liquid it froze from. " * 4


class Handler(BaseHTTPRequestHandler):
    """Waits as a model would work, then ranks by position."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer a ranking request."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = len(body["passages"])
        time.sleep(SECONDS * -(-count // PER_PASSAGES))
        self._answer({"rankings": [{"index": index, "logit": -float(index)} for index in range(count)]})

    def do_GET(self) -> None:
        """List the model."""
        self._answer({"object": "list", "data": [{"id": MODEL, "root": MODEL}]})

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


def serve(pipe: Any) -> None:
    """Serve on a free port and tell which."""
    with Server(("127.0.0.1", 0), Handler) as server:
        pipe.send(server.server_address[1])
        server.serve_forever()


@contextmanager
def a_server() -> Iterator[str]:
    """Run the server in a process of its own; yields its base URL."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def medians(baselines: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Time each baseline in turn, run after run; give the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in baselines}
    for run in range(runs + 1):
        for name, baseline in baselines.items():
            start = time.perf_counter()
            baseline()
            if run:  # the first one opens connections
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    names = ("httpx", "langchain-nvidia-ai-endpoints", "mistral-rerank")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")
    print(f"{os.cpu_count()} CPUs, median of {runs} alternating runs")
    print(f"the server takes {SECONDS * 1000:.0f} ms per {PER_PASSAGES} passages\n")
    loop = asyncio.new_event_loop()
    with a_server() as url:
        baseline = NVIDIARerank(base_url=url, model=MODEL, top_n=5, truncate="END")
        ours = MistralRerank(backend="remote", base_url=url, model=MODEL, protocol="nvidia", top_n=5)
        documents = [Document(page_content=f"{number} {TEXT}") for number in range(512)]
        seconds_of = medians(
            {
                "NVIDIARerank": lambda: baseline.compress_documents(documents, "why?"),
                "ours": lambda: ours.compress_documents(documents, "why?"),
                "NVIDIARerank, async": lambda: loop.run_until_complete(baseline.acompress_documents(documents, "why?")),
                "ours, async": lambda: loop.run_until_complete(ours.acompress_documents(documents, "why?")),
            },
            runs,
        )
        print("512 passages")
        for name, seconds in seconds_of.items():
            base = seconds_of["NVIDIARerank, async" if "async" in name else "NVIDIARerank"]
            print(f"  {name:22} {seconds * 1000:8.1f} ms   {base / seconds:5.2f} times as fast")

        texts = [document.page_content for document in documents[:32]]
        request = RerankRequest("why?", tuple(texts), model=MODEL)
        body = PROTOCOLS["nvidia"].write_request(request)
        client, async_client, reranker = httpx.Client(), httpx.AsyncClient(), ours.use()
        seconds_of = medians(
            {
                "a bare post": lambda: client.post(f"{url}/ranking", json=body).json(),
                "ours": lambda: reranker.rank("why?", texts),
                "a bare post, async": lambda: loop.run_until_complete(
                    async_client.post(f"{url}/ranking", json=body)
                ).json(),
                "ours, async": lambda: loop.run_until_complete(reranker.arank("why?", texts)),
            },
            runs * 3,
        )
        print("32 passages")
        for name, seconds in seconds_of.items():
            base = seconds_of["a bare post, async" if "async" in name else "a bare post"]
            print(f"  {name:22} {seconds * 1000:8.1f} ms   {seconds / base - 1:+7.1%}")
        ours.unload()
        client.close()
        loop.run_until_complete(async_client.aclose())
    loop.close()


if __name__ == "__main__":
    main()
