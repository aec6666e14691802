"""Load the server with many clients, some of which leave, and compare shared batches with one request per forward.

python benchmarks/server_load.py [--model mini] [--clients 64] [--requests 2000] [--leaving 0.05] [--forward-ms 0]
    [--device cpu] [--tolerance 1e-4]

The server is another process on one thread; both kinds run in turn, on the same requests of 1 to 40 passages. Every
reply is compared with the scores of the same model in this process; the script fails where one is wrong or missing.
`--model random` is a small Mistral with random weights; `--forward-ms` adds a fixed wait to each forward, as the
launches of an accelerator do. On a CPU the dtype is float32, elsewhere the default one, whose rounding depends on the
batch: give `--tolerance`.
"""

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch

QUERIES = tuple(f"question {number}: why does it float" for number in range(8))
PASSAGES = tuple(f"passage {number} " + "of a few more words " * (number % 4) for number in range(160))
KINDS = {"one request per forward": False, "shared": True}


@dataclass(frozen=True)
class Ask:
    """One request: a question, its passages, and whether its client leaves."""

    query: str
    passages: tuple[str, ...]
    leaves: bool


def make_requests(count: int, leaving: float) -> list[Ask]:
    """Give the same requests every time."""
    draw = random.Random(0)
    return [
        Ask(draw.choice(QUERIES), tuple(draw.choices(PASSAGES, k=draw.randint(1, 40))), draw.random() < leaving)
        for _ in range(count)
    ]


def write_random_model(folder: str) -> None:
    """Write a Mistral of 2 layers of 64 with random weights, and mini's tokenizer."""
    from transformers import MistralConfig, MistralForSequenceClassification

    from mistral_rerank.local.checkpoints.loading import load_tokenizer, open_checkpoint

    tokenizer = load_tokenizer(open_checkpoint("mini"))
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_labels=1,
        initializer_range=0.2,
        pad_token_id=tokenizer.eos_token_id,
    )
    MistralForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Path(folder, "rerank.json").write_text("{}", "utf-8")  # the defaults


def open_local(options: argparse.Namespace, **settings: Any) -> Any:
    """Open the reranker of the options."""
    from mistral_rerank import LocalReranker

    dtype = "float32" if options.device == "cpu" else "auto"
    return LocalReranker(options.model, device=options.device, dtype=dtype, **settings)


def serve(pipe: Any, options: argparse.Namespace, share: bool) -> None:
    """Serve on a free port and tell which."""
    import uvicorn

    from mistral_rerank.local.model.rerank_model import RerankModel
    from mistral_rerank.server.app import create_app
    from mistral_rerank.server.settings import ServerSettings

    torch.set_num_threads(1)
    forward: Callable[..., list[float]] = RerankModel.logits

    @wraps(forward)
    def slowed(*arguments: Any) -> list[float]:
        time.sleep(options.forward_ms / 1000)
        return forward(*arguments)

    if options.forward_ms:
        RerankModel.logits = slowed  # type: ignore[method-assign]
    reranker = open_local(options, batch_tokens=options.batch_tokens, share_batches=share)
    app = create_app(reranker, ServerSettings(max_requests=1000))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_keep_alive=75))

    def tell() -> None:
        while not server.started:
            time.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])

    threading.Thread(target=tell, daemon=True).start()
    server.run()


@contextmanager
def a_server(options: argparse.Namespace, share: bool) -> Iterator[tuple[str, int]]:
    """Run the server in a process of its own; yields its URL and its process id."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, options, share), daemon=True)
    process.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}"
        while httpx.get(f"{url}/v1/health/ready").status_code != 200:
            time.sleep(0.05)
        yield url, process.pid or 0
    finally:
        process.terminate()
        process.join()


def memory(pid: int) -> float:
    """Give the resident memory of a process, in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@dataclass
class Outcome:
    """Counts and times of one load."""

    seconds: float
    answered: int
    left: int
    wrong: int
    failed: Counter[str]
    latencies: list[float]
    memory: list[float]
    batch: float


async def load(
    url: str, pid: int, asks: list[Ask], options: argparse.Namespace, expected: dict[tuple[str, str], float]
) -> Outcome:
    """Send all requests, so many at once, and judge every reply."""
    outcome = Outcome(0, 0, 0, 0, Counter(), [], [], 0)
    waiting = iter(asks)
    draw = random.Random(1)
    clients = options.clients
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def send(client: httpx.AsyncClient, ask: Ask) -> None:
        body = {"query": {"text": ask.query}, "passages": [{"text": text} for text in ask.passages]}
        start = time.perf_counter()
        leave_after = draw.uniform(0, 0.05) if ask.leaves else None
        try:
            reply = await asyncio.wait_for(client.post(f"{url}/v1/ranking", json=body), leave_after)
        except TimeoutError:
            outcome.left += 1
            return
        if reply.status_code != 200:
            outcome.failed[str(reply.status_code)] += 1
            return
        outcome.latencies.append(time.perf_counter() - start)
        outcome.answered += 1
        logits = {ranking["index"]: ranking["logit"] for ranking in reply.json()["rankings"]}
        reference = {index: expected[ask.query, text] for index, text in enumerate(ask.passages)}
        right = logits.keys() == reference.keys() and all(
            abs(logits[i] - reference[i]) <= options.tolerance for i in reference
        )
        outcome.wrong += not (right and list(logits.values()) == sorted(logits.values(), reverse=True))

    async def client_of(client: httpx.AsyncClient) -> None:
        for ask in waiting:
            await send(client, ask)
            if (outcome.answered + outcome.left) % max(1, len(asks) // 8) == 0:
                outcome.memory.append(memory(pid))

    async with httpx.AsyncClient(limits=limits, timeout=300) as client:
        start = time.perf_counter()
        await asyncio.gather(*(client_of(client) for _ in range(clients)))
        outcome.seconds = time.perf_counter() - start
        text = (await client.get(f"{url}/metrics")).text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("mistral_rerank_batch_size_"))
    outcome.batch = float(counts["mistral_rerank_batch_size_sum"]) / float(counts["mistral_rerank_batch_size_count"])
    outcome.memory.append(memory(pid))
    if not text.count("mistral_rerank_queue_size 0.0"):
        outcome.failed["still in the queue"] += 1
    return outcome


def main() -> None:
    """Print the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--leaving", type=float, default=0.05)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--forward-ms", type=float, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()

    names = ("torch", "transformers", "uvicorn", "fastapi", "mistral-rerank")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")
    print(
        f"{os.cpu_count()} CPUs, model {options.model} on one thread, {options.batch_tokens} tokens a forward at most"
    )
    print(f"{options.clients} clients, {options.requests} requests, {options.leaving:.0%} leave within 50 ms")
    if options.forward_ms:
        print(f"every forward waits {options.forward_ms:g} ms more, as an accelerator's launches do")
    torch.set_num_threads(1)
    asks = make_requests(options.requests, options.leaving)
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "random":
            write_random_model(folder)
            options.model = folder
        with open_local(options) as local:
            pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
            expected = dict(zip(pairs, (score.logit for score in local.score_pairs(pairs)), strict=True))
        outcomes = {}
        for name, share in KINDS.items():
            with a_server(options, share) as (url, pid):
                outcomes[name] = asyncio.run(load(url, pid, asks, options, expected))
    for name, outcome in outcomes.items():
        quantiles = statistics.quantiles(outcome.latencies, n=20)
        print(
            f"\n{name}\n"
            f"  {outcome.answered / outcome.seconds:.1f} requests/s; "
            f"p50 {quantiles[9] * 1000:.0f} ms, p95 {quantiles[18] * 1000:.0f} ms; "
            f"{outcome.batch:.1f} sequences a forward\n"
            f"  {outcome.answered} answered, {outcome.left} left, {outcome.wrong} wrong, "
            f"{sum(outcome.failed.values())} failed {dict(outcome.failed) or ''}\n"
            f"  memory, MiB: {' '.join(f'{value:.0f}' for value in outcome.memory)}"
        )
    speeds = [outcome.answered / outcome.seconds for outcome in outcomes.values()]
    print(f"\nshared / one request per forward: {speeds[1] / speeds[0]:.2f}")
    bad = sum(outcome.wrong + sum(outcome.failed.values()) for outcome in outcomes.values())
    lost = sum(options.requests - outcome.answered - outcome.left for outcome in outcomes.values())
    if bad or lost:
        sys.exit(f"{bad} replies wrong or failed, {lost} lost")


if __name__ == "__main__":
    main()
