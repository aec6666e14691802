"""Limits on connections: their number, the time until a request's headers, and the time of a stalled reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h11
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from mistral_rerank.server.errors import error_response

if TYPE_CHECKING:
    import asyncio

    from mistral_rerank.server.settings import ServerSettings

HEADER_SECONDS = 10.0
"""Time from the first byte, or from the start of the connection, to the last header of a request."""


def limited_protocol(settings: ServerSettings, header_seconds: float = HEADER_SECONDS) -> type[H11Protocol]:
    """Make uvicorn's HTTP protocol with the limits of one server.

    Args:
        settings: `max_connections` and `transfer_timeout`.
        header_seconds: time for the headers of a request.

    """
    idle: dict[LimitedProtocol, None] = {}
    """Idle connections, the longest idle first."""

    class LimitedProtocol(H11Protocol):
        """Closes connections that send or read too slowly, and the longest idle one if there are too many."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._timers: dict[str, asyncio.TimerHandle] = {}

        @override
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            idle[self] = None
            self._abort_in(header_seconds, "request")
            if len(self.connections) > settings.max_connections:
                longest = next(iter(idle))
                del idle[longest]
                longest.transport.abort()

        @override
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                idle.pop(self, None)
                self._stop("request")
            elif "request" not in self._timers:
                self._abort_in(header_seconds, "request")

        @override
        def send_400_response(self, msg: str) -> None:
            """Answer what is not HTTP with the error object."""
            answer = error_response("", 400, "the request is not valid HTTP")
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
            self.transport.close()

        @override
        def on_response_complete(self) -> None:
            idle[self] = None  # before the next request of a pipeline begins
            super().on_response_complete()
            if not self.cycle.response_complete:
                idle.pop(self, None)

        @override
        def pause_writing(self) -> None:
            super().pause_writing()
            self._abort_in(settings.transfer_timeout, "reader")

        @override
        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop("reader")

        @override
        def connection_lost(self, exc: Exception | None) -> None:
            idle.pop(self, None)
            self._stop("request")
            self._stop("reader")
            super().connection_lost(exc)

        def _abort_in(self, seconds: float, timer: str) -> None:
            self._timers[timer] = self.loop.call_later(seconds, self.transport.abort)

        def _stop(self, timer: str) -> None:
            if timer in self._timers:
                self._timers.pop(timer).cancel()

    return LimitedProtocol
