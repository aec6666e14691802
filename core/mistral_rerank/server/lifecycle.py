"""Runs the application on this machine, with a graceful shutdown."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import uvicorn
from typing_extensions import override

from mistral_rerank.errors import SettingsError
from mistral_rerank.server.app import create_app
from mistral_rerank.server.connections import limited_protocol

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.server.service import Service
    from mistral_rerank.server.settings import ServerSettings

logger = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEEP_ALIVE_SECONDS = 75
"""Idle time of a connection: longer than that of clients, so that the server does not close it under a request."""
DRAIN_SECONDS = 30.0
"""Time for running requests after the first signal to stop."""


class DrainingServer(uvicorn.Server):
    """Stops gracefully: reports that it is not ready, and exits after the last running request.

    A second signal stops it at once. It also exits if its model cannot be loaded.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_until: float | None = None

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
        else:
            self._service.draining = True
            self._drain_until = time.monotonic() + DRAIN_SECONDS

    @override
    async def on_tick(self, counter: int) -> bool:
        drained = self._drain_until is not None and (
            self._service.in_flight == 0 or time.monotonic() > self._drain_until
        )
        self.should_exit = self.should_exit or drained or self._service.failure is not None
        return await super().on_tick(counter)


def server_config(
    app: FastAPI, settings: ServerSettings, *, host: str = "127.0.0.1", port: int = 0, log_level: str = "info"
) -> uvicorn.Config:
    """Make uvicorn's configuration, with the limits on connections."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        http=limited_protocol(settings),
        ws="none",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


def serve(reranker: Reranker, settings: ServerSettings, *, host: str, port: int, log_level: str = "info") -> None:
    """Serve a reranker over HTTP until SIGINT or SIGTERM.

    Args:
        reranker: the caller closes it.
        settings: names, keys and limits.
        host: the address to bind to.
        port: the port to bind to.
        log_level: uvicorn's.

    Raises:
        SettingsError: the port is taken.
        RerankError: the model cannot be loaded.

    """
    if not settings.api_keys and host not in LOOPBACK:
        logger.warning("every client that reaches %s may rerank; set keys to change that", host)
    app = create_app(reranker, settings)
    service: Service = app.state.service
    config = server_config(app, settings, host=host, port=port, log_level=log_level)
    try:
        DrainingServer(config, service).run()
    except SystemExit as exit_:  # uvicorn has logged why it could not start
        raise SettingsError(f"cannot serve at {host}:{port}; is the port taken? Give another one") from exit_
    if service.failure is not None:
        raise service.failure
