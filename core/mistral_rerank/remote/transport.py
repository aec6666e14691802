"""HTTP requests: the only module that uses httpx.

A `Request` gives a `Response`, whatever its status; an error means that no response arrived. There is one client for
threads, and one for each event loop, because event loops cannot share connections.
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

    `timeout` is in seconds, for each part of the response. `deadline` is for the whole response, on `time.monotonic`'s
    clock.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    content: bytes | None
    timeout: float
    deadline: float


@dataclass(frozen=True, slots=True)
class Response:
    """The status, the headers by lower-case names, and the whole body."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Transport:
    """Sends requests from threads and event loops.

    Args:
        connect_timeout: seconds to wait for a connection.
        verify: whether certificates are verified, or the SSL context for it.
        proxy: the URL of a proxy; None for the environment's.
        transport: an httpx transport for threads, in place of the network.
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
        """Drop all clients; a forked child leaves the parent's connections open."""
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    def send(self, request: Request) -> Response:
        """Send a request from this thread.

        Raises:
            EndpointUnreachableError: no connection, a broken connection, or no response in time.
            InvalidReplyError: the response is too large, or its encoding is not the declared one.
            SettingsError: the environment's proxy or certificates cannot be used.
            MissingDependencyError: the proxy is a SOCKS proxy, and the extra `socks` is not installed.

        """
        client = self._thread_client()
        with _map_errors(request), until(request.deadline), client.stream(**self._arguments(request)) as response:
            content = bytearray()
            for part in response.iter_bytes():
                _extend(content, part)
        return _response(response, content)

    async def asend(self, request: Request) -> Response:
        """Send a request from the running event loop; errors as for `send`. Cancelling closes its connection.

        The caller enforces the deadline, with `asyncio.timeout`.
        """
        client = self._async_client()
        with _map_errors(request):
            async with client.stream(**self._arguments(request)) as response:
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
                with self._environment_errors():
                    self._client = httpx.Client(transport=self._transport, **self._options)
                obey_deadlines(self._client)
            return self._client

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            client = self._async_clients.get(loop)
            if client is None:
                with self._environment_errors():
                    client = httpx.AsyncClient(transport=self._async_transport, **self._options)
                self._async_clients[loop] = client
        return client

    @contextmanager
    def _environment_errors(self) -> Iterator[None]:
        try:
            yield
        except UNUSABLE as error:
            raise misconfigured(error, proxy=self._options["proxy"]) from None

    def _arguments(self, request: Request) -> dict[str, Any]:
        return {
            "method": request.method,
            "url": request.url,
            "headers": dict(request.headers),
            "content": request.content,
            "timeout": httpx.Timeout(request.timeout, connect=min(self._connect_timeout, request.timeout)),
        }


@contextmanager
def _map_errors(request: Request) -> Iterator[None]:
    """Turn httpx's exceptions into this package's, which name the URL without its query."""
    url = shown_url(request.url)
    try:
        yield
    except httpx.ConnectTimeout as error:
        raise EndpointUnreachableError(f"no connection to {url} in time; is it up, is the port open?") from error
    except httpx.TimeoutException as error:
        raise EndpointUnreachableError(f"{url} gave no answer within {request.timeout:.3g} s") from error
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
