"""Parses JSON bodies with bounded time and memory.

A body of some megabytes can contain millions of numbers or lists, which take seconds and gigabytes as Python objects.
The values are therefore counted before the body is parsed, at the speed of `bytes.count`.
"""

from __future__ import annotations

import asyncio
import re
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

INLINE_BYTES = 256_000
"""Longest body that is parsed on the event loop; longer ones are parsed in a thread."""
VALUES_PER_PASSAGE = 100
"""Most JSON values of a body, per allowed passage; leaves room for metadata."""


class JsonRequest(Request):
    """A request whose JSON body is bounded, and parsed in a thread if it is long."""

    @override
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            service: Service = self.app.state.service
            max_values = VALUES_PER_PASSAGE * max(1000, service.settings.max_passages)
            body = await self.body()
            if len(body) <= INLINE_BYTES:
                self._json = parse(body, max_values)
            else:
                async with service.parsing:
                    self._json = await asyncio.to_thread(parse, body, max_values)
        return self._json


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest`."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            is_empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if not is_empty and not re.fullmatch(r"application/(.+\+)?json", kind):
                raise HTTPException(415, "the Content-Type must be application/json")
            return await handler(JsonRequest(request.scope, request.receive))

        return answer


def parse(body: bytes, max_values: int) -> Any:
    """Parse a body.

    Args:
        body: UTF-8, with or without a byte order mark.
        max_values: most values of the body.

    Raises:
        HTTPException: 400, it is not JSON; 413, it has more values.

    """
    body = body.removeprefix(b"\xef\xbb\xbf")
    if has_more_values(body, max_values):
        raise HTTPException(413, f"the body holds more than {max_values} JSON values; send fewer passages at once")
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not valid JSON: {error}") from None


def has_more_values(body: bytes, limit: int) -> bool:
    """Whether a body has more than `limit` values; exact for JSON, up to the first syntax error."""
    if _marks(body) <= limit:
        return False
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # left to right, as escapes are read
    if plain.count(b'"') > 4 * limit:  # a value has at most two strings: its key and itself
        return True
    return _marks(b"".join(plain.split(b'"')[::2])) > limit


def _marks(text: bytes) -> int:
    """Count the characters that precede a value."""
    return sum(map(text.count, (b",", b"[", b"{")))
