"""The reranker behind an HTTP endpoint."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import threading
import time
import weakref
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from mistral_rerank._forks import after_fork
from mistral_rerank._version import __version__
from mistral_rerank.errors import DeadlineExceededError, RemoteError, RerankerClosedError, SettingsError
from mistral_rerank.protocols.urls import candidates, vendor_of
from mistral_rerank.remote.endpoint import Batch, Endpoint
from mistral_rerank.remote.rate_limit import RateLimit
from mistral_rerank.remote.retries import Retries
from mistral_rerank.remote.session import arun, run
from mistral_rerank.remote.transport import Transport
from mistral_rerank.reranker import Overflow, Pair, Reranker, Score, TextPairs

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping, Sequence

    import httpx

Protocol = Literal["auto", "nvidia", "cohere", "jina", "vllm", "tei", "voyage"]

KEY_VARIABLE = "MISTRAL_RERANK_API_KEY"

NO_CHUNKS = "overflow='chunk' needs the local backend; give 'truncate' or 'error'"

SMALLEST_SPLIT = 32
"""Fewest passages of one of several concurrent requests."""

MAX_THREADS = 64

CLOSED = "the reranker is closed; open another one"

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
RESERVED_HEADERS = frozenset({"content-length", "content-type", "host", "transfer-encoding", "x-request-id"})


class RemoteReranker(Reranker):
    """Scores pairs at an endpoint: NVIDIA's API, a NIM, this package's server, vLLM, TEI, Cohere, Jina, Voyage.

    The first request is sent when the first pair is scored. Safe to use from threads and any number of event loops.
    A pickle holds the settings without the key, the headers, the transports and the SSL context.

    Args:
        model: its name at the endpoint; None for the model that the endpoint serves.
        base_url: the root of a host, or with `/v1` or a proxy's prefix, or the whole route, optionally with a query
            such as `?api-version=1`; None for the vendor's.
        protocol: of the endpoint; "auto" detects it with the first request.
        api_key: sent as a bearer token to the host of `base_url` alone; None for `MISTRAL_RERANK_API_KEY`, or else,
            at a vendor's own hosts over https, for that vendor's variable, such as `NVIDIA_API_KEY`.
        overflow: whether a pair over the model's limit is truncated or refused ("error"), where the protocol offers
            a choice; "chunk" needs the local backend.
        instruction: what counts as relevant, where the protocol has an instruction; None for the endpoint's default.
        timeout: seconds of a call in total.
        connect_timeout: seconds to wait for a connection.
        read_timeout: seconds to wait for each part of a response before a retry; None for the rest of the timeout.
        retries: of a failed request: their number, or number and waits.
        max_passages: most passages of a request, also above the protocol's limit; None for that limit. An endpoint
            that refuses so many gets fewer in later requests.
        max_concurrency: most concurrent requests of one call.
        requests_per_minute: most requests per minute; None for no limit.
        score_unit: unit of the endpoint's scores; "auto" for that of its protocol.
        headers: sent to the host of `base_url` with every request, such as a gateway's `api-key`. Their values are
            secrets.
        verify: whether certificates are verified, or the SSL context for it.
        proxy: URL of a proxy; None for the environment's.
        transport: an httpx transport for threads, in place of the network.
        async_transport: the same for event loops.

    Raises:
        SettingsError: a setting is invalid.

    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        protocol: Protocol = "auto",
        api_key: str | SecretStr | None = None,
        overflow: Overflow = "truncate",
        instruction: str | None = None,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        read_timeout: float | None = None,
        retries: Retries | int = 2,
        max_passages: int | None = None,
        max_concurrency: int = 8,
        requests_per_minute: float | None = None,
        score_unit: Literal["auto", "logit", "probability"] = "auto",
        headers: Mapping[str, str | SecretStr] | None = None,
        verify: bool | ssl.SSLContext = True,
        proxy: str | None = None,
        transport: httpx.BaseTransport | None = None,
        async_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if overflow == "chunk":
            raise SettingsError(NO_CHUNKS)
        self._settings = {
            "model": model,
            "base_url": base_url,
            "protocol": protocol,
            "overflow": overflow,
            "instruction": instruction,
            "timeout": timeout,
            "connect_timeout": connect_timeout,
            "read_timeout": read_timeout,
            "retries": retries,
            "max_passages": max_passages,
            "max_concurrency": max_concurrency,
            "requests_per_minute": requests_per_minute,
            "score_unit": score_unit,
            "proxy": proxy,
        }
        routes = candidates(base_url, protocol, model)
        private = _private_headers(_key(api_key, routes[0][1]), headers or {})
        self.model, self._timeout, self._overflow, self._instruction = model, timeout, overflow, instruction
        self._max_passages, self._max_concurrency = max_passages, max_concurrency
        self._host = urlsplit(routes[0][1]).netloc
        self._endpoint = Endpoint(
            routes,
            model=model,
            headers={
                "Accept": "application/json",
                "Content-Type": "application/json",
                "User-Agent": f"mistral-rerank/{__version__}",
            },
            private_headers=private,
            unit=None if score_unit == "auto" else score_unit,
            retries=Retries(retries) if isinstance(retries, int) else retries,
            rate=RateLimit(requests_per_minute),
            read_timeout=read_timeout,
        )
        self._transport = Transport(
            connect_timeout=connect_timeout,
            verify=verify,
            proxy=proxy,
            transport=transport,
            async_transport=async_transport,
        )
        self._closed = threading.Event()
        self._make_threads()
        after_fork(self._restart)

    def _make_threads(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="mistral-rerank-remote")
        self._finalizer = weakref.finalize(self, _release, self._transport, self._threads)

    def _restart(self) -> None:
        """Make new threads in a forked child, and leave the parent's to the parent."""
        is_closed, self._closed = self._closed.is_set(), threading.Event()
        self._finalizer.detach()
        self._make_threads()
        if is_closed:
            self.close()

    def __reduce__(self) -> tuple[functools.partial[RemoteReranker], tuple[()]]:
        """Pickle the settings, never the key."""
        return functools.partial(RemoteReranker, **self._settings), ()  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"RemoteReranker({self.model!r}, host={self._host!r}, protocol={self._endpoint.protocol.name!r})"

    @property
    def model_name(self) -> str:
        """The model's name, or else the endpoint's host."""
        return self.model or self._host

    def score_pairs(
        self, pairs: Sequence[Pair], *, overflow: Overflow | None = None, instruction: str | None = None
    ) -> list[Score]:
        """See `Reranker.score_pairs`.

        Raises:
            RemoteError: one of its kinds; there is never a partial result.

        """
        call = TextPairs(pairs)
        deadline = time.monotonic() + self._timeout
        scores: list[Score | None] = [None] * len(call.pairs)
        stopped = threading.Event()
        batches = self._batches(call.pairs, overflow, instruction)
        running: dict[Future[list[Score]], list[int]] = {}
        try:
            while True:
                while len(running) < self._concurrency() and (following := next(batches, None)):
                    batch, indices = following
                    running[self._start(batch, deadline, stopped)] = indices
                if not running:
                    return call.complete(self._endpoint.with_unit(_complete(scores)))
                remaining = max(0.0, deadline - time.monotonic())
                done = wait(running, timeout=remaining, return_when=FIRST_COMPLETED).done
                if not done:
                    raise self._deadline_error()
                for future in done:
                    for index, score in zip(running.pop(future), future.result(), strict=True):
                        scores[index] = score
        finally:
            stopped.set()
            for future in running:
                future.cancel()

    async def ascore_pairs(
        self, pairs: Sequence[Pair], *, overflow: Overflow | None = None, instruction: str | None = None
    ) -> list[Score]:
        """See `Reranker.ascore_pairs`; cancelling closes the connections of the call. Errors as `score_pairs`'s."""
        call = TextPairs(pairs)
        deadline = time.monotonic() + self._timeout
        scores: list[Score | None] = [None] * len(call.pairs)
        batches = list(self._batches(call.pairs, overflow, instruction))
        queue = iter(batches)

        async def score(batch: Batch, indices: list[int]) -> None:
            session = self._endpoint.score(batch, deadline)
            batch_scores = await arun(session, self._transport, check=self._check_open)
            for index, batch_score in zip(indices, batch_scores, strict=True):
                scores[index] = batch_score

        async def work() -> None:
            for batch, indices in queue:
                await score(batch, indices)

        try:
            async with asyncio.timeout(self._timeout):
                if batches and (len(batches) == 1 or not self._endpoint.is_known):
                    await score(*next(queue))
                if len(batches) > 1:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(len(batches), self._max_concurrency)):
                            group.create_task(work())
        except RemoteError:
            raise
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        except TimeoutError:
            raise self._deadline_error() from None
        return call.complete(self._endpoint.with_unit(_complete(scores)))

    def close(self) -> None:
        """Close the connections; waiting calls fail with RerankerClosedError."""
        self._closed.set()
        _release(self._transport, self._threads)

    async def aclose(self) -> None:
        """`close`, and the running loop's connections too."""
        self._closed.set()
        await self._transport.aclose()
        _release(self._transport, self._threads)

    def _batches(
        self, pairs: Sequence[Pair], overflow: Overflow | None, instruction: str | None
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Split a call into batches of one question each, within the limits; also give the indices of their pairs."""
        overflow, instruction = overflow or self._overflow, instruction or self._instruction
        if overflow == "chunk":
            raise SettingsError(NO_CHUNKS)
        limit = self._max_passages or self._endpoint.protocol.max_passages
        limit = min(limit, self._endpoint.max_passages or limit)
        size = min(limit, max(SMALLEST_SPLIT, -(-len(pairs) // self._max_concurrency)))
        by_query: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(index)
        for query, query_indices in by_query.items():
            indices: list[int] = []
            used_bytes = _length(query)
            for index in query_indices:
                length = _length(pairs[index][1])
                if indices and (len(indices) == size or used_bytes + length > self._endpoint.max_bytes):
                    yield Batch(query, [pairs[i][1] for i in indices], overflow == "truncate", instruction), indices
                    indices, used_bytes = [], _length(query)
                indices.append(index)
                used_bytes += length
            yield Batch(query, [pairs[i][1] for i in indices], overflow == "truncate", instruction), indices

    def _concurrency(self) -> int:
        """How many requests may run at once: one until the protocol is known."""
        return self._max_concurrency if self._endpoint.is_known else 1

    def _start(self, batch: Batch, deadline: float, stopped: threading.Event) -> Future[list[Score]]:
        def check() -> None:
            self._check_open()
            if stopped.is_set():
                raise CancelledError  # the caller has left

        session = self._endpoint.score(batch, deadline)
        try:
            return self._threads.submit(run, session, self._transport, sleep=stopped.wait, check=check)
        except RuntimeError as error:
            raise RerankerClosedError(CLOSED) from error

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RerankerClosedError(CLOSED)

    def _deadline_error(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"no answer from {self._host} within {self._timeout:g} s; raise timeout")


def _complete(scores: list[Score | None]) -> list[Score]:
    return [score for score in scores if score is not None]


def _length(text: str) -> int:
    """Give the bytes of a text in a request's body, with its braces and names."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 32


def _key(api_key: str | SecretStr | None, url: str) -> str | None:
    """Give the key for a URL: the argument, `MISTRAL_RERANK_API_KEY`, or at a vendor's host its variable."""
    vendor = vendor_of(url)
    variables = (KEY_VARIABLE, *(vendor.key_variables if vendor else ()))
    key = _revealed(api_key) or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if key is not None and not _fits_a_header(key):
        raise SettingsError("the api_key holds spaces at its ends or characters that no header may hold")
    return key


def _private_headers(key: str | None, user_headers: Mapping[str, str | SecretStr]) -> dict[str, str]:
    """Merge the bearer token and the user's headers; names are case-insensitive."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for name, value in user_headers.items():
        revealed = _revealed(value)
        if not HEADER_NAME.fullmatch(name) or name.lower() in RESERVED_HEADERS:
            raise SettingsError(f"headers: {name!r:.40} is no name of a header that may be set")
        if revealed is None or not _fits_a_header(revealed):
            raise SettingsError(f"headers: the value of {name!r:.40} has characters that no header may hold")
        headers[name.lower()] = revealed
    return headers


def _revealed(value: str | SecretStr | None) -> str | None:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _fits_a_header(value: str) -> bool:
    return value.isascii() and value.isprintable() and value == value.strip()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _release(transport: Transport, threads: ThreadPoolExecutor) -> None:
    transport.close()
    threads.shutdown(wait=False, cancel_futures=True)
