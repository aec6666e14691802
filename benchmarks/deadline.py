"""Print how long calls with a deadline take while the model is busy, and while an endpoint hangs.

python benchmarks/deadline.py [--model mini] [--deadline 0.2] [--calls 200]
"""

import argparse
import asyncio
import socket
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.reranker import Reranker

QUERY = "Which river flows through the valley?"
PASSAGES = 20
LOADERS = 4

Rerank = Callable[[], list[str]]


@contextmanager
def load(reranker: Reranker, texts: list[str]):
    """Rank from several threads until the end of the block."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            reranker.rank(QUERY, texts)

    threads = [threading.Thread(target=work) for _ in range(LOADERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ways(texts: list[str], runner: asyncio.Runner, **options: object) -> dict[str, Rerank]:
    """Give the calls of both frameworks, each of which gives the texts of its result."""
    documents = [Document(page_content=text) for text in texts]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    compressor = langchain_mistral_rerank.MistralRerank(top_n=None, on_error="keep_order", **options)
    postprocessor = llama_index_mistral_rerank.MistralRerank(top_n=None, on_error="keep_order", **options)
    return {
        "LangChain": lambda: [d.page_content for d in compressor.compress_documents(documents, QUERY)],
        "LangChain, async": lambda: [
            d.page_content for d in runner.run(compressor.acompress_documents(documents, QUERY))
        ],
        "LlamaIndex": lambda: [n.node.text for n in postprocessor.postprocess_nodes(nodes, query_str=QUERY)],
        "LlamaIndex, async": lambda: [
            n.node.text for n in runner.run(postprocessor.apostprocess_nodes(nodes, query_str=QUERY))
        ],
    }


def measure(name: str, calls: dict[str, Rerank], number: int, texts: list[str]) -> None:
    """Print one line for each way."""
    for way, call in calls.items():
        call()  # opens what there is to open
        seconds, in_order = [], 0
        for _ in range(number):
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
            in_order += result == texts
        cuts = statistics.quantiles(seconds, n=100)
        print(f"| {name} | {way} | {number} | {in_order} | {cuts[49]:.3f} | {cuts[98]:.3f} | {max(seconds):.3f} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--deadline", type=float, default=0.2)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    passage = " ".join(list(load_beir(FACTS).corpus.values())[:8])
    texts = [f"{number} {passage}" for number in range(PASSAGES)]  # too many for any call to end in time
    print(f"deadline {options.deadline} s")
    print("| | framework | calls | in the retriever's order | p50 s | p99 s | longest s |")
    print("|---|---|--:|--:|--:|--:|--:|")
    runner = asyncio.Runner()  # one event loop, as a server has
    local = ways(texts, runner, model=options.model, deadline=options.deadline)
    reranker = langchain_mistral_rerank.MistralRerank(model=options.model).use()
    reranker.rank(QUERY, ["warm up"])
    with load(reranker, texts[:4]):
        measure("busy model", local, options.calls, texts)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:  # accepts connections, and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        endpoint = {"backend": "remote", "base_url": url, "protocol": "nvidia", "model": "m"}
        remote = ways(texts, runner, **endpoint, deadline=options.deadline)
        measure("hanging endpoint", remote, options.calls, texts)


if __name__ == "__main__":
    main()
