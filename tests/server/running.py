"""A real server on loopback: in a thread of the test, as the command, or replicas of it on Ray."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import httpx
import pytest
import uvicorn
from command import COMMAND

from mistral_rerank import Reranker, RerankSettings
from mistral_rerank.server.app import create_app
from mistral_rerank.server.lifecycle import DrainingServer, server_config
from mistral_rerank.server.service import Service
from mistral_rerank.server.settings import ServerSettings


@contextmanager
def running(reranker: Reranker | dict[str, RerankSettings], **settings: object) -> Iterator[str]:
    """Serve on a free port; yields the base URL."""
    app = create_app(reranker, ServerSettings(**settings))
    with served(server_config(app, app.state.service.settings), app.state.service) as url:
        yield url


@contextmanager
def served(config: uvicorn.Config, service: Service) -> Iterator[str]:
    server = DrainingServer(config, service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and server.servers[0].sockets):
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
    (socket,) = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def commanded(*options: str, ready: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Run `mistral-rerank serve` as a process; yields it, with its `url`, when it is ready, or else at once."""
    port = free_port()
    environment = os.environ | {"MISTRAL_RERANK_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [COMMAND, "serve", "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    process.url = f"http://127.0.0.1:{port}"
    try:
        if ready:
            with httpx.Client(base_url=process.url) as client:
                wait_until_ready(client)
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(client: httpx.Client) -> None:
    for _ in range(1200):
        try:
            if client.get("/v1/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server was not ready within a minute")


@cache
def ray_cluster() -> str:
    """Start Ray and its proxy once for all tests, on a free port; gives the base URL. Skips where Ray is not installed."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'mistral-rerank[cluster]'")
    from ray import serve

    port = free_port()
    path = os.pathsep.join(sys.path)  # so that the replicas find the tests' modules
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    return f"http://127.0.0.1:{port}"


@contextmanager
def replicated(open_reranker: Callable[[], Reranker], replicas: int = 2, **settings: object) -> Iterator[str]:
    """Serve replicas on Ray. Yields the base URL."""
    url = ray_cluster()
    from ray import serve

    from mistral_rerank.server.cluster import ClusterSettings, deployment

    cluster = ClusterSettings(min_replicas=replicas, max_replicas=replicas, cpus=0.1)
    serve.run(deployment(open_reranker, ServerSettings(**settings), cluster), name="tested")
    try:
        yield url
    finally:
        serve.delete("tested")


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            children += map(int, file.read_text().split())
    return [pid, *(found for child in children for found in descendants(child))]


def listening(pids: list[int]) -> set[str]:
    """The addresses, in hexadecimal, on which processes listen."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                sockets.add(str(link.readlink()))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
