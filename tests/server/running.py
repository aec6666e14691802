"""A real server on loopback, in a thread of the test, or replicas of it on Ray."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import uvicorn

from mistral_rerank import Reranker
from mistral_rerank.server.app import create_app
from mistral_rerank.server.run import DrainingServer
from mistral_rerank.server.settings import ServerSettings


@contextmanager
def running(reranker: Reranker, **settings: object) -> Iterator[str]:
    """Serve on a free port; yields the base URL."""
    app = create_app(reranker, ServerSettings(**settings))
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = DrainingServer(config, app.state.service)
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


@cache
def ray_cluster() -> str:
    """Start Ray and its proxy once for all tests, on a free port; gives the base URL. Skips where Ray is not installed."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'mistral-rerank[cluster]'")
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(sys.path)  # so that the replicas find the tests' modules
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
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
