"""Middleware: request ids, metrics, API keys, admission and limits on bodies.

It is plain ASGI, so that disconnects reach the routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException

from mistral_rerank._telemetry import server_span
from mistral_rerank.server.errors import error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mistral_rerank.server.service import Service

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset(
    ("/", "/health", "/v1/health/live", "/v1/health/ready", "/metrics", "/v1/metrics", "/v1/version", "/openapi.json")
)
"""Paths without a key: the page, the API's description, health and metrics."""
SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class RequestContext:
    """Gives every request an id (the client's if it sent one), answers unexpected errors, and updates the metrics."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics, self._spans = app, service.metrics, service.settings.telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the HTTP server leaves out the body
        client_id = headers.get("x-request-id", "")
        request_id = client_id if SAFE_ID.fullmatch(client_id) else uuid.uuid4().hex
        if not self._spans:
            await self._answer(scope, receive, send, request_id)
            return
        with server_span(scope["method"], headers, request_id) as answered:
            answered(*await self._answer(scope, receive, send, request_id))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> tuple[str, int]:
        """Handle it; give its route and the status of the response."""
        status, start = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if status:  # the response has started, so the connection can only be closed
                raise
            message = f"the server failed ({type(error).__name__}); its log says more"
            await error_response(scope["path"], 500, message)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - start)
        return route, status


class BearerKeys:
    """Refuses requests without one of the keys, except on open paths. Without keys, all requests are accepted."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._rejections = app, service.metrics.rejections
        self._keys = [_digest(key.get_secret_value()) for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or refuse it."""
        if scope["type"] != "http" or not self._keys or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        self._rejections.labels("key").inc()
        message = "the key is missing or wrong; send it as Authorization: Bearer KEY"
        refusal = error_response(scope["path"], 401, message, headers={"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._keys]  # all, so that the time is constant
        return scheme.lower() == "bearer" and any(matches)


class Admission:
    """Counts a request before its body is read, and refuses it if there are too many.

    A body is refused if its declared or its actual length is too large, if it arrives too slowly, or if the bodies of
    all requests together are too large.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            with self._service.admitted():
                await self._read(scope, receive, send)
        except HTTPException as refused:
            refusal = error_response(scope["path"], refused.status_code, refused.detail, headers=refused.headers)
            await refusal(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, settings = self._service, self._service.settings
        limit = settings.max_body_bytes
        too_long = f"the body is longer than {limit} bytes; send fewer or shorter passages at once"
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise service.rejection("body", 413, too_long, close=True)
        length, complete = 0, False
        deadline = asyncio.get_running_loop().time() + settings.transfer_timeout

        async def limited() -> Message:
            nonlocal length, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not arrive within {settings.transfer_timeout:g} s; send it faster"
                raise service.rejection("slow_body", 408, late, close=True) from None
            size = len(message.get("body", b""))
            length += size
            service.held_bytes += size
            complete = not message.get("more_body", False)
            if length > limit:
                raise service.rejection("body", 413, too_long, close=True)
            if service.held_bytes > settings.max_held_bytes:
                full = "the server holds as many bytes of requests as it may; try again"
                raise service.rejection("bytes", 503, full, close=True)
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            service.held_bytes -= length


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
