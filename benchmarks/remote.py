"""Compare the remote backend with NVIDIA's LangChain reranker, on one loopback server that speaks their protocol.

python benchmarks/remote.py [--runs 7]

The server is another process; it takes 50 ms for every 32 passages of a request, and serves requests at once.
"""

import argparse
import asyncio
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import httpx
from endpoint import MODEL, PER_PASSAGES, endpoint
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank

from langchain_mistral_rerank import MistralRerank
from mistral_rerank.protocols import PROTOCOLS, RerankRequest

SECONDS = 0.050
TEXT = "Ice floats on water because it is about nine percent less dense than the liquid it froze from. " * 4


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
    with endpoint(SECONDS) as url:
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
