"""A real server on loopback, in a thread of the test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
