"""Compare the server with infinity-emb on the same weights, the same machine and the same load.

mistral-rerank export --model mini --dtype float32 --out mini-merged
python -m venv infinity && infinity/bin/pip install 'infinity-emb[server,torch]'
python benchmarks/server.py --model mini-merged --infinity infinity/bin/infinity_emb [--rounds 5] [--requests 100]

Both servers are started by their commands, with the same dtype and number of threads, and get load in alternating
rounds. infinity-emb gets a copy of the folder in the format of its transformers 4. It joins question and passage
without the template, so its inputs are a few tokens shorter.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from mistral_rerank.demo import FACTS


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    url: str


def make_bodies(requests: int, max_passages: int) -> list[dict[str, object]]:
    """Give the same requests every time: real sentences, 1 to `max_passages` a request."""
    rng = random.Random(0)
    texts = [json.loads(line)["text"] for line in (FACTS / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {"query": f"{rng.choice(texts)[:60]}?", "documents": rng.choices(texts, k=rng.randint(1, max_passages))}
        for _ in range(requests)
    ]


def free_port() -> int:
    """Give a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(name: str, command: list[str], port: int, route: str, threads: int) -> Iterator[Server]:
    """Run a server until the block ends; waits until it ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        server = Server(name, f"http://127.0.0.1:{port}{route}")
        try:
            while not ranks(server):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{name} did not start:\n{log.read()[-3000:]}")
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            process.wait()


def ranks(server: Server) -> bool:
    """Whether a server answers."""
    try:
        return httpx.post(server.url, json={"query": "q", "documents": ["a"]}, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


async def load(server: Server, bodies: list[dict[str, object]], clients: int) -> tuple[float, list[float]]:
    """Send all bodies from concurrent clients; give the seconds of all together and of each request."""
    waiting, seconds = iter(bodies), []

    async def one_client(client: httpx.AsyncClient) -> None:
        for body in waiting:
            start = time.perf_counter()
            reply = await client.post(server.url, json=body)
            seconds.append(time.perf_counter() - start)
            if reply.status_code != 200 or len(reply.json()["results"]) != len(body["documents"]):  # type: ignore[arg-type]
                sys.exit(f"{server.name} answered {reply.status_code}: {reply.text[:300]}")

    async with httpx.AsyncClient(timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
        return time.perf_counter() - start, seconds


def transformers_4_copy(model: Path, folder: Path) -> None:
    """Copy the checkpoint, with the rotary base and the tokenizer's class as transformers 4 writes them."""
    shutil.copytree(model, folder)
    for name, changes in (
        ("config.json", lambda content: {"rope_theta": content["rope_parameters"]["rope_theta"]}),
        (
            "tokenizer_config.json",
            lambda _: {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {}},
        ),
    ):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes(content)), encoding="utf-8")


def main() -> None:
    """Print the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--infinity", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    listing = subprocess.run(
        [options.infinity.with_name("pip"), "list", "--format=json"], capture_output=True, text=True, check=True
    )
    infinity_versions = {entry["name"].replace("_", "-"): entry["version"] for entry in json.loads(listing.stdout)}
    names = ("torch", "transformers", "uvicorn", "mistral-rerank")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")
    print(
        "infinity:",
        ", ".join(f"{n} {infinity_versions[n]}" for n in ("infinity-emb", "torch", "transformers", "uvicorn")),
    )
    print(
        f"{os.cpu_count()} CPUs; threads a server: {options.threads}; {options.dtype}; "
        f"{options.rounds} alternating rounds"
    )
    print(f"{options.clients} clients, {options.requests} requests of 1 to {options.passages} passages a round\n")
    sys.stdout.flush()
    bodies = make_bodies(options.requests, options.passages)
    our_port, infinity_port = free_port(), free_port()
    command = [str(Path(sys.executable).with_name("mistral-rerank")), "serve", "--model", str(options.model)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        transformers_4_copy(options.model, folder)
        infinity = [
            str(options.infinity),
            "v2",
            "--model-id",
            str(folder),
            "--host",
            "127.0.0.1",
            "--no-model-warmup",
        ]
        infinity += ["--device", "cpu", "--dtype", options.dtype]
        servers = [
            stack.enter_context(running(name, line, port, route, options.threads))
            for name, line, port, route in (
                ("infinity-emb", [*infinity, "--port", str(infinity_port)], infinity_port, "/rerank"),
                ("ours", [*command, "--dtype", options.dtype, "--port", str(our_port)], our_port, "/v1/rerank"),
            )
        ]
        measured: dict[str, list[tuple[float, list[float]]]] = {server.name: [] for server in servers}
        for _ in range(options.rounds):
            for server in servers:
                measured[server.name].append(asyncio.run(load(server, bodies, options.clients)))
    rows = {}
    for name, rounds in measured.items():
        speed = statistics.median(options.requests / seconds for seconds, _ in rounds)
        quantiles = statistics.quantiles([second for _, request_seconds in rounds for second in request_seconds], n=20)
        rows[name] = (speed, quantiles[9], quantiles[18])
        print(f"{name:14} {speed:6.2f} requests/s   p50 {quantiles[9]:6.2f} s   p95 {quantiles[18]:6.2f} s")
    round_ratios = [
        theirs[0] / ours[0] for theirs, ours in zip(measured["infinity-emb"], measured["ours"], strict=True)
    ]
    ratios = [ours / theirs for ours, theirs in zip(rows["ours"], rows["infinity-emb"], strict=True)]
    print(f"ours / infinity-emb: requests/s {ratios[0]:.2f}, p50 {ratios[1]:.2f}, p95 {ratios[2]:.2f}")
    print("requests/s of each round:", " ".join(f"{ratio:.2f}" for ratio in round_ratios))


if __name__ == "__main__":
    main()
