"""Requests over HTTP: the one module that knows httpx.

A `Request` goes in and an `Response` comes out, whatever its status; only where none comes is there an error. There
is one client for threads, and one for each event loop, whose connections no other loop can use.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from mistral_rerank._forks import after_fork
from mistral_rerank.errors import EndpointUnreachableError, InvalidReplyError
from mistral_rerank.protocols.urls import shown_url
from mistral_rerank.remote.deadline import obey_deadlines, until
from mistral_rerank.remote.environment import UNUSABLE, misconfigured

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

MAX_REPLY_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """A request.

    `timeout` is how many seconds may pass before each part of its answer, `deadline` when the whole of it has to be
    there, on `time.monotonic`'s clock.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    content: bytes | None
    timeout: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Response:
    """Status, headers by lower-case names, and the whole body."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Transport:
    """Sends calls, for threads and for event loops.

    Args:
        connect_timeout: seconds to wait for a connection.
        verify: whether certificates are checked, or the context to check them with.
        proxy: the URL of a proxy; None for the environment's.
        transport: an httpx transport instead of the network's, for threads.
        async_transport: the same for event loops.

    """

    def __init__(
        self,
        *,
        connect_timeout: float = 5.0,
        verify: bool | ssl.SSLContext = True,
        proxy: str | None = None,
        transport: httpx.BaseTransport | None = None,
        async_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connect_timeout = connect_timeout
        self._options: dict[str, Any] = {
            "verify": verify,
            "proxy": proxy,
            "follow_redirects": False,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }
        self._transport, self._async_transport = transport, async_transport
        self._forget_clients()
        after_fork(self._forget_clients)

    def _forget_clients(self) -> None:
        """Have no connections; in a forked child those of the parent are left to it, and not closed."""
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    def send(self, call: Request) -> Response:
        """Send a call from this thread.

        Raises:
            EndpointUnreachableError: no connection, or it broke, or nothing came in time.
            InvalidReplyError: the answer is too large, or not encoded as it says.
            SettingsError: the environment's proxy or certificates cannot be used.
            MissingDependencyError: the proxy is a SOCKS proxy, and the extra `socks` is not installed.

        """
        client = self._thread_client()
        with _faults(call), until(call.deadline), client.stream(**self._request(call)) as response:
            content = bytearray()
            for part in response.iter_bytes():
                _extend(content, part)
        return _response(response, content)

    async def asend(self, call: Request) -> Response:
        """Send a call from the running event loop; cancelling closes its connection. Errors as `send`'s.

        The deadline is the caller's to keep, with `asyncio.timeout`.
        """
        client = self._async_client()
        with _faults(call):
            async with client.stream(**self._request(call)) as response:
                content = bytearray()
                async for part in response.aiter_bytes():
                    _extend(content, part)
        return _response(response, content)

    def close(self) -> None:
        """Close the connections of threads, and forget those of event loops."""
        with self._lock:
            client, self._client = self._client, None
            self._async_clients.clear()
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close the connections of threads and of the running loop."""
        client = self._async_clients.pop(asyncio.get_running_loop(), None)
        self.close()
        if client is not None:
            await client.aclose()

    def _thread_client(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                with self._readable_environment():
                    self._client = httpx.Client(transport=self._transport, **self._options)
                obey_deadlines(self._client)
            return self._client

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._async_clients.get(loop)
            if client is None:
                with self._readable_environment():
                    client = httpx.AsyncClient(transport=self._async_transport, **self._options)
                self._async_clients[loop] = client
        return client

    @contextmanager
    def _readable_environment(self) -> Iterator[None]:
        try:
            yield
        except UNUSABLE as error:
            raise misconfigured(error, proxy=self._options["proxy"]) from None

    def _request(self, call: Request) -> dict[str, Any]:
        return {
            "method": call.method,
            "url": call.url,
            "headers": dict(call.headers),
            "content": call.content,
            "timeout": httpx.Timeout(call.timeout, connect=min(self._connect_timeout, call.timeout)),
        }


@contextmanager
def _faults(call: Request) -> Iterator[None]:
    """Turn what httpx raises into this package's errors, which name the URL without its query."""
    url = shown_url(call.url)
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise EndpointUnreachableError(f"no connection to {url} in time; is it up, is the port open?") from error
    except httpx.TimeoutException as error:
        raise EndpointUnreachableError(f"{url} gave no answer within {call.timeout:.3g} s") from error
    except httpx.DecodingError as error:
        raise InvalidReplyError(f"{url} sent a body that is not encoded as it says: {error}") from error
    except httpx.ConnectError as error:
        raise EndpointUnreachableError(
            f"no connection to {url}: {error}; check base_url, and that the server is up"
        ) from error
    except httpx.TransportError as error:
        raise EndpointUnreachableError(f"the connection to {url} broke: {error}") from error


def _extend(content: bytearray, part: bytes) -> None:
    content += part
    if len(content) > MAX_REPLY_BYTES:
        raise InvalidReplyError(f"an answer of more than {MAX_REPLY_BYTES} bytes")


def _response(response: httpx.Response, content: bytearray) -> Response:
    return Response(response.status_code, dict(response.headers), bytes(content))
