"""HTTP requests from threads and event loops: the only module that uses httpx.

`Transport.send` gives a `Response`, whatever its status; an error means that no response arrived. Event loops cannot
share connections, so each has a client of its own. Threads share one more loop, which runs in the background.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from mistral_rerank._forks import after_fork
from mistral_rerank.errors import (
    EndpointUnreachableError,
    InvalidReplyError,
    MissingDependencyError,
    RerankerClosedError,
    RerankError,
    SettingsError,
)
from mistral_rerank.protocols.urls import shown_url

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping

T = TypeVar("T")

MAX_REPLY_BYTES = 64 * 1024 * 1024
CLOSED = "the reranker is closed; open another one"
UNREACHABLE = "check base_url, and that the server is up"
TLS_ADVICE = {
    "CERTIFICATE_VERIFY_FAILED": "set SSL_CERT_FILE to the certificate of its authority",
    "WRONG_VERSION_NUMBER": "this port takes no TLS; give a base_url with http://",
}

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
UNUSABLE = (ImportError, ValueError, OSError, httpx.InvalidURL)
"""Exceptions of httpx's clients for proxies and certificates that it cannot use."""


@dataclass(frozen=True, slots=True)
class Response:
    """The status, the headers by lower-case names, and the whole body."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Transport:
    """Sends requests from threads and event loops; see `RemoteReranker` for its arguments."""

    def __init__(
        self,
        *,
        connect_timeout: float = 5.0,
        verify: bool | ssl.SSLContext = True,
        proxy: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connect_timeout, self._proxy = connect_timeout, proxy
        self._options: dict[str, Any] = {
            "transport": transport,
            "verify": verify,
            "proxy": proxy,
            "follow_redirects": False,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }
        self._is_closed = False
        self._stop_loop: weakref.finalize[..., Transport] | None = None
        self._forget_loops()
        after_fork(self._forget_loops)

    def _forget_loops(self) -> None:
        """Drop all loops and clients; a forked child leaves the parent's connections open."""
        self._lock = threading.Lock()
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        if self._stop_loop is not None:
            self._stop_loop.detach()  # a forked child shares the loop's sockets with its parent
        self._stop_loop = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the background loop, and wait for its result in this thread.

        Raises:
            RerankerClosedError: the transport is closed, or was closed meanwhile.

        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise RerankerClosedError(CLOSED)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop or self._start_loop())
        try:
            return future.result()
        except CancelledError:
            raise RerankerClosedError(CLOSED) from None
        finally:
            future.cancel()  # if this thread was interrupted

    def _start_loop(self) -> asyncio.AbstractEventLoop:
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop, stop = runner.get_loop(), asyncio.Event()
        self._stop_loop = weakref.finalize(self, _stop, self._loop, stop)
        arguments = (runner, stop, self._clients)
        threading.Thread(target=_run_loop, args=arguments, name="mistral-rerank-remote", daemon=True).start()
        return self._loop

    async def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | None = None,
        *,
        timeout: float,  # noqa: ASYNC109 - of each part
        deadline: float,
    ) -> Response:
        """Send a request from the running event loop. Cancelling closes its connection.

        `timeout` is in seconds, for each part; `deadline`, on `time.monotonic`'s clock, is for the whole response.

        Raises:
            EndpointUnreachableError: no connection, a broken connection, or no response in time.
            InvalidReplyError: the response is too large, or its encoding is not the declared one.
            RerankerClosedError: the transport is closed, or was closed meanwhile.
            SettingsError: the environment's proxy or certificates cannot be used.
            MissingDependencyError: the proxy is a SOCKS proxy, and the extra `socks` is not installed.

        """
        client = self._client()
        timeouts = httpx.Timeout(timeout, connect=min(self._connect_timeout, timeout))
        body = bytearray()
        with self._map_errors(url, timeout):
            async with (
                asyncio.timeout(deadline - time.monotonic()),
                client.stream(method, url, headers=dict(headers), content=content, timeout=timeouts) as response,
            ):
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > MAX_REPLY_BYTES:
                        raise InvalidReplyError(f"an answer of more than {MAX_REPLY_BYTES} bytes")
        return Response(response.status_code, dict(response.headers), bytes(body))

    def close(self) -> None:
        """End the calls of threads, close their connections, and forget those of other event loops."""
        with self._lock:
            self._is_closed = True
            if self._stop_loop is not None:
                self._stop_loop()
            for loop in set(self._clients) - {self._loop}:
                del self._clients[loop]

    async def aclose(self) -> None:
        """`close`, and the connections of the running loop too."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        self.close()
        if client is not None:
            await client.aclose()

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._is_closed:
                raise RerankerClosedError(CLOSED)
            client = self._clients.get(loop)
            if client is None:
                try:
                    client = httpx.AsyncClient(**self._options)
                except UNUSABLE as error:
                    raise _misconfigured(error, proxy=self._proxy) from None
                self._clients[loop] = client
        return client

    @contextmanager
    def _map_errors(self, url: str, timeout: float) -> Iterator[None]:
        """Turn httpx's exceptions into this package's, which name the URL without its query."""
        url = shown_url(url)
        try:
            yield
        except httpx.ConnectTimeout as error:
            raise EndpointUnreachableError(f"no connection to {url} in time; is it up, is the port open?") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise EndpointUnreachableError(f"{url} gave no answer within {timeout:.3g} s") from error
        except httpx.DecodingError as error:
            raise InvalidReplyError(f"{url} sent a body that is not encoded as it says: {error}") from error
        except httpx.ConnectError as error:
            advice = next((advice for reason, advice in TLS_ADVICE.items() if reason in str(error)), UNREACHABLE)
            raise EndpointUnreachableError(f"no connection to {url}: {error}; {advice}") from error
        except httpx.TransportError as error:
            if self._is_closed:
                raise RerankerClosedError(CLOSED) from None
            advice = "; if this port takes only TLS, give a base_url with https://" if url.startswith("http:") else ""
            raise EndpointUnreachableError(
                f"the connection to {url} broke: {str(error).rstrip('.')}{advice}"
            ) from error


def _run_loop(
    runner: asyncio.Runner,
    stop: asyncio.Event,
    clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient],
) -> None:
    """Run the background loop until `stop` is set; its end cancels the remaining calls."""

    async def wait() -> None:
        await stop.wait()
        client = clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    with runner:
        runner.run(wait())


def _stop(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(stop.set)


def _misconfigured(error: Exception, *, proxy: str | None) -> RerankError:
    """Name the setting or the variable that httpx cannot use; the only value that it shows is a file's path."""
    if isinstance(error, OSError | ssl.SSLError):
        name = next((name for name in CERTIFICATES if os.environ.get(name)), "verify")
        return SettingsError(
            f"{name} names no usable file of certificates: {os.environ.get(name, '')} ({error.strerror or error}); "
            "give the path of a PEM file, or unset it"
        )
    socks = isinstance(error, ImportError)
    name = "proxy" if proxy else _proxy_variable(socks=socks)
    if socks:
        return MissingDependencyError(
            f"{name} is a SOCKS proxy, which needs an extra: pip install 'mistral-rerank[socks]'"
        )
    return SettingsError(f"{name} is no usable proxy; give an address like http://host:3128 or socks5://host:1080")


def _proxy_variable(*, socks: bool) -> str:
    """Give the variable with a SOCKS proxy, or with a proxy that httpx cannot use."""
    for name in (*PROXIES, *map(str.lower, PROXIES)):
        value = os.environ.get(name)
        if not value:
            continue
        try:
            httpx.Proxy(value if "://" in value else f"http://{value}")
        except UNUSABLE:
            return name
        if socks and value.startswith("socks"):
            return name
    return " or ".join((*PROXIES, "NO_PROXY"))
