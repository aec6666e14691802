"""Runs the application on this machine, with a graceful shutdown."""

from __future__ import annotations

import logging
import logging.config
import signal
import time
from typing import TYPE_CHECKING

import uvicorn
from typing_extensions import override

from mistral_rerank.errors import SettingsError
from mistral_rerank.server.app import create_app
from mistral_rerank.server.connections import limited_protocol
from mistral_rerank.server.request_log import log_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

    from fastapi import FastAPI

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.server.service import Service
    from mistral_rerank.server.settings import ServerSettings
    from mistral_rerank.settings import RerankSettings

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


def warn_of_open_server(settings: ServerSettings, host: str) -> None:
    """Log a warning if other machines can rerank without a key."""
    has_keys = settings.api_keys or settings.api_key_file
    if not has_keys and settings.uds is None and host not in LOOPBACK:
        logger.warning("every client that reaches %s may rerank; set keys to change that", host)


def server_config(app: FastAPI, settings: ServerSettings, *, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Config:
    """Make uvicorn's configuration, with the limits on connections; `serve` configures the log."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        http=limited_protocol(settings),
        ws="none",
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        uds=str(settings.uds) if settings.uds else None,
        root_path=settings.root_path.rstrip("/"),
        proxy_headers=settings.forwarded_allow_ips is not None,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )


def serve(reranker: Reranker | Mapping[str, RerankSettings], settings: ServerSettings, *, host: str, port: int) -> None:
    """Serve a reranker, or several models, over HTTP until SIGINT or SIGTERM; SIGHUP reads the key file again.

    Args:
        reranker: as in `create_app`.
        settings: names, keys and limits.
        host: the address to bind to.
        port: the port to bind to.

    Raises:
        SettingsError: the port is taken.
        RerankError: the model cannot be loaded.

    """
    logging.config.dictConfig(log_config(settings.log_level, settings.log_format))
    warn_of_open_server(settings, host)
    app = create_app(reranker, settings)
    service: Service = app.state.service
    config = server_config(app, settings, host=host, port=port)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: service.keys.reload())
    try:
        DrainingServer(config, service).run()
    except SystemExit as exit_:  # uvicorn has logged why it could not start
        address = str(settings.uds or f"{host}:{port}")
        raise SettingsError(f"cannot serve at {address}; is the port taken? Give another one") from exit_
    if service.failure is not None:
        raise service.failure
