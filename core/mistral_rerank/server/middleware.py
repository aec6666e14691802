"""Middleware: request ids, log lines, metrics, API keys, admission and limits on bodies.

It is plain ASGI, so that disconnects reach the routes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match

from mistral_rerank._telemetry import server_span
from mistral_rerank.server.errors import error_response, route_path
from mistral_rerank.server.public_errors import public_message
from mistral_rerank.server.request_log import PROBES, RequestRecord, current_record, log_request, record_of_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mistral_rerank.server.service import Service

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset(("/", "/v1/version", "/openapi.json")) | PROBES
"""Paths without a key: the page, the API's description, health and metrics."""
SAFE_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
KEY = "mistral_rerank.key"
"""The client's `ApiKey` in the scope."""


class RequestContext:
    """Gives a request its id (the client's if it sent one), log line and metrics, and answers unexpected errors."""

    def __init__(self, app: ASGIApp, service: Service, routes: Sequence[BaseRoute]) -> None:
        self._app, self._routes = app, routes
        self._metrics, self._spans = service.metrics, service.settings.telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client_id = headers.get("x-request-id", "")
        request_id = client_id if SAFE_ID.fullmatch(client_id) else uuid.uuid4().hex
        record = RequestRecord(request_id, scope["method"])
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the HTTP server leaves out the body
        if not self._spans:
            await self._answer(scope, receive, send, record)
            return
        with server_span(scope["method"], headers, request_id) as answered:
            await self._answer(scope, receive, send, record)
            answered(record.route, record.status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        """Handle it, and complete its record."""
        start = time.perf_counter()
        record_of_request.set(record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.id
            await send(message)

        try:
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                both = "send Content-Length or Transfer-Encoding, not both"  # a proxy may see another length
                self._metrics.rejections.labels("framing").inc()
                refusal = error_response(route_path(scope), 400, both, headers={"Connection": "close"})
                await refusal(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", record.id)
            if record.status:  # the response has started, so the connection can only be closed
                raise
            await error_response(route_path(scope), 500, public_message(error))(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            record.route, record.total_ms = self._route(scope), seconds * 1000
            self._metrics.requests.labels(record.route, record.status).inc()
            self._metrics.request_seconds.labels(record.route).observe(seconds)
            if record.key is not None:
                self._metrics.key_requests.labels(record.key, record.status).inc()
            if record.model is not None:
                self._metrics.model_requests.labels(record.model, record.status).inc()
            if route_path(scope) not in PROBES:
                log_request(record)

    def _route(self, scope: Scope) -> str:
        """Give the path of the route, also if the request was refused before it was routed."""
        if (route := scope.get("route")) is None:
            route = next((route for route in self._routes if route.matches(scope)[0] is Match.FULL), None)
        return getattr(route, "path", "other")


class BearerKeys:
    """Refuses requests without one of the keys, except on open paths. Without keys, all requests are accepted."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._rejections, self._keys = app, service.metrics.rejections, service.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or refuse it."""
        if scope["type"] != "http" or not self._keys or route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        key = self._keys.find(Headers(scope=scope).get("authorization", ""))
        if key is not None:
            scope[KEY] = key
            current_record().key = key.name
            await self._app(scope, receive, send)
            return
        self._rejections.labels("key").inc()
        message = "the key is missing or wrong; send it as Authorization: Bearer KEY"
        refusal = error_response(route_path(scope), 401, message, headers={"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)


class Admission:
    """Counts a request before its body is read, and refuses it if there are too many.

    A body is refused if it is compressed, if its declared or its actual length is too large, if it arrives too slowly,
    or if the bodies of all requests together are too large.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        try:
            with self._service.admitted(path, scope.get(KEY)):
                await self._read(scope, receive, send, path)
        except HTTPException as refused:
            refusal = error_response(path, refused.status_code, refused.detail, headers=refused.headers)
            await refusal(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        service, settings, headers = self._service, self._service.settings, Headers(scope=scope)
        if headers.get("content-encoding", "identity").lower() != "identity":
            plain = "the Content-Encoding is not supported; send the body uncompressed"
            raise service.rejection("encoding", 415, plain, close=True)
        limit = settings.max_body_bytes
        too_long = f"the body is longer than {limit} bytes; send fewer or shorter passages at once"
        declared = headers.get("content-length", "")
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
                raise service.overloaded("bytes", path, full, close=True)
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            service.held_bytes -= length
