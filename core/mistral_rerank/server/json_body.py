"""Reading JSON bodies so that none of them stops the server, whatever it holds.

A body is at most some megabytes long, but that is room for millions of numbers or lists, which take seconds and
gigabytes as Python objects. So the values are counted before anything is parsed, at the speed of `bytes.count`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.responses import Response

    from mistral_rerank.server.service import Service

ON_THE_LOOP = 256_000
"""Bytes up to which a body is parsed on the event loop; longer ones are parsed in a thread."""
VALUES_PER_PASSAGE = 100
"""How many JSON values a body may hold for each passage that it may hold: room for metadata."""


class JsonRequest(Request):
    """A request whose JSON body is bounded, and parsed in a thread if it is long."""

    @override
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            service: Service = self.app.state.service
            most = VALUES_PER_PASSAGE * max(1000, service.settings.max_passages)
            body = await self.body()
            if len(body) <= ON_THE_LOOP:
                self._json = parse(body, most)
            else:
                async with service.parsing:
                    self._json = await asyncio.to_thread(parse, body, most)
        return self._json


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest`."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return answer


def parse(body: bytes, most: int) -> Any:
    """Parse a body.

    Args:
        body: UTF-8, with or without a byte order mark.
        most: how many values it may hold.

    Raises:
        HTTPException: 400, it is not JSON; 413, it holds more values.

    """
    body = body.removeprefix(b"\xef\xbb\xbf")
    if holds_more_values(body, most):
        raise HTTPException(413, f"the body holds more than {most} JSON values; send fewer passages at once")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from None


def holds_more_values(body: bytes, most: int) -> bool:
    """Whether a parser could meet more than `most` values in a body: it is exact for JSON, up to the first fault."""
    if _marks(body) <= most:
        return False
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # left to right, as escapes are read
    if plain.count(b'"') > 4 * most:  # a value has at most two strings: its key and itself
        return True
    return _marks(b"".join(plain.split(b'"')[::2])) > most


def _marks(text: bytes) -> int:
    """Count what a value, or the first of a container, comes after."""
    return sum(map(text.count, (b",", b"[", b"{")))
