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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr

from mistral_rerank._forks import after_fork
from mistral_rerank._version import __version__
from mistral_rerank.errors import DeadlineExceededError, RemoteError, RerankerClosedError, SettingsError
from mistral_rerank.protocols.urls import candidates, vendor_of
from mistral_rerank.remote.rate_limit import RateLimit, Retries
from mistral_rerank.remote.session import Batch, Endpoint, Sleep
from mistral_rerank.remote.transport import Transport
from mistral_rerank.reranker import Overflow, Pair, Reranker, Score, TextPairs

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping, Sequence

    import httpx

    from mistral_rerank.remote.session import Session

Protocol = Literal["auto", "nvidia", "cohere", "jina", "vllm", "tei", "voyage"]

KEY_VARIABLE = "MISTRAL_RERANK_API_KEY"

NO_CHUNKS = "overflow='chunk' is done on this machine alone; give 'truncate' or 'error'"

SMALLEST_SPLIT = 32
"""A call is spread over concurrent requests of no fewer passages than this."""

MOST_THREADS = 64

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
OWN_HEADERS = frozenset({"content-length", "content-type", "host", "transfer-encoding", "x-request-id"})


class RemoteReranker(Reranker):
    """Scores pairs at an endpoint: NVIDIA's API, a NIM, this package's server, vLLM, TEI, Cohere, Jina, Voyage.

    Nothing is sent before the first pair is scored. Safe to use from threads and from any number of event loops.
    A pickle holds the settings without the key, the headers, the transports and the SSL context.

    Args:
        model: its name at the endpoint; None for whichever is served.
        base_url: the root of a host, or with `/v1` or a proxy's prefix, or the whole route, with a query such as
            `?api-version=1` if need be; None for the vendor's own.
        protocol: which protocol is spoken; "auto" finds out with the first request.
        api_key: sent as a bearer token to the host of `base_url` alone; None for `MISTRAL_RERANK_API_KEY`, or else,
            at a vendor's own hosts over https, for that vendor's variable, such as `NVIDIA_API_KEY`.
        overflow: whether a pair over the model's limit is cut ("truncate") or refused ("error"), where the
            protocol offers a choice; "chunk" is done on this machine alone.
        timeout: seconds that a call may take in all.
        connect_timeout: seconds to wait for a connection.
        read_timeout: seconds to wait for each part of an answer before trying again; None: all that is left.
        retries: how often a failed request is sent again, or just their number.
        max_passages: the most passages of a request, also above the protocol's limit; None for that limit. An
            endpoint that refuses so many gets fewer from then on.
        max_concurrency: how many requests of one call may be under way at once.
        requests_per_minute: the most requests a minute; None for no limit.
        score_unit: what the endpoint's scores are; "auto" for what its protocol says.
        headers: sent to the host of `base_url` with every request, such as a gateway's `api-key`. Their values are
            treated as secrets.
        status_url: where to ask for results that are not ready (202); None for NVIDIA's, at its host alone.
        poll_wait: seconds between such questions.
        verify: whether certificates are checked, or the context to check them with.
        proxy: a proxy's URL; None for the environment's.
        transport: an httpx transport for threads, instead of the network's.
        async_transport: the same for event loops.

    Raises:
        SettingsError: a setting does not fit.

    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        protocol: Protocol = "auto",
        api_key: str | SecretStr | None = None,
        overflow: Overflow = "truncate",
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        read_timeout: float | None = None,
        retries: Retries | int = 2,
        max_passages: int | None = None,
        max_concurrency: int = 8,
        requests_per_minute: float | None = None,
        score_unit: Literal["auto", "logit", "probability"] = "auto",
        headers: Mapping[str, str | SecretStr] | None = None,
        status_url: str | None = None,
        poll_wait: float = 0.1,
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
            "timeout": timeout,
            "connect_timeout": connect_timeout,
            "read_timeout": read_timeout,
            "retries": retries,
            "max_passages": max_passages,
            "max_concurrency": max_concurrency,
            "requests_per_minute": requests_per_minute,
            "score_unit": score_unit,
            "status_url": status_url,
            "poll_wait": poll_wait,
            "proxy": proxy,
        }
        tried = candidates(base_url, protocol, model)
        private = _private_headers(_key(api_key, tried[0][1]), headers or {})
        self.model, self._timeout, self._overflow = model, timeout, overflow
        self._max_passages, self._max_concurrency = max_passages, max_concurrency
        self._host = urlsplit(tried[0][1]).netloc
        self._endpoint = Endpoint(
            tried,
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
            status_url=status_url,
            poll_wait=poll_wait,
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
        after_fork(self._start_anew)

    def _make_threads(self) -> None:
        self._threads = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="mistral-rerank-remote")
        self._finalizer = weakref.finalize(self, _release, self._transport, self._threads)

    def _start_anew(self) -> None:
        """Leave the parent's threads to the parent."""
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
        """The model as the user named it, or else the endpoint's host."""
        return self.model or self._host

    def score_pairs(self, pairs: Sequence[Pair], *, overflow: Overflow | None = None) -> list[Score]:
        """See `Reranker.score_pairs`.

        Raises:
            RemoteError: one of its kinds; there is never a partial result.

        """
        call = TextPairs(pairs)
        pairs = call.pairs
        deadline = time.monotonic() + self._timeout
        found: list[Score | None] = [None] * len(pairs)
        stopped = threading.Event()
        batches = self._batches(pairs, overflow)
        running: dict[Future[list[Score]], list[int]] = {}
        try:
            while True:
                while len(running) < self._at_once() and (cut := next(batches, None)):
                    batch, places = cut
                    running[self._start(batch, deadline, stopped)] = places
                if not running:
                    scores = self._endpoint.settled_scores([score for score in found if score is not None])
                    return call.complete(scores)
                left = max(0.0, deadline - time.monotonic())
                done = wait(running, timeout=left, return_when=FIRST_COMPLETED).done
                if not done:
                    raise self._late()
                for future in done:
                    for place, score in zip(running.pop(future), future.result(), strict=True):
                        found[place] = score
        finally:
            stopped.set()
            for future in running:
                future.cancel()

    async def ascore_pairs(self, pairs: Sequence[Pair], *, overflow: Overflow | None = None) -> list[Score]:
        """See `Reranker.ascore_pairs`; cancelling closes the connections of the call. Errors as `score_pairs`'s."""
        call = TextPairs(pairs)
        pairs = call.pairs
        deadline = time.monotonic() + self._timeout
        found: list[Score | None] = [None] * len(pairs)
        cut = list(self._batches(pairs, overflow))
        batches = iter(cut)

        async def fill(batch: Batch, places: list[int]) -> None:
            steps = self._endpoint.score(batch, deadline)
            for place, score in zip(places, await self._adrive(steps), strict=True):
                found[place] = score

        async def work() -> None:
            for batch, places in batches:
                await fill(batch, places)

        try:
            async with asyncio.timeout(self._timeout):
                if cut and (len(cut) == 1 or not self._endpoint.is_settled):
                    await fill(*next(batches))
                if len(cut) > 1:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(len(cut), self._max_concurrency)):
                            group.create_task(work())
        except RemoteError:
            raise
        except BaseExceptionGroup as group_error:
            raise _first(group_error) from None
        except TimeoutError:
            raise self._late() from None
        scores = self._endpoint.settled_scores([score for score in found if score is not None])
        return call.complete(scores)

    def close(self) -> None:
        """Close the connections; waiting calls fail with RerankerClosedError."""
        self._closed.set()
        _release(self._transport, self._threads)

    async def aclose(self) -> None:
        """`close`, and the running loop's connections too."""
        self._closed.set()
        await self._transport.aclose()
        _release(self._transport, self._threads)

    def _batches(self, pairs: Sequence[Pair], overflow: Overflow | None) -> Iterator[tuple[Batch, list[int]]]:
        """Cut a call into requests, with the places of their pairs: one question each, within the limits."""
        overflow = overflow or self._overflow
        if overflow == "chunk":
            raise SettingsError(NO_CHUNKS)
        protocol = self._endpoint.protocol
        limit = self._max_passages or protocol.max_passages
        limit = min(limit, self._endpoint.most_passages or limit)
        size = min(limit, max(SMALLEST_SPLIT, -(-len(pairs) // self._max_concurrency)))
        by_query: dict[str, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(place)
        for query, places in by_query.items():
            taken: list[int] = []
            used = _length(query)
            for place in places:
                length = _length(pairs[place][1])
                if taken and (len(taken) == size or used + length > self._endpoint.most_bytes):
                    yield Batch(query, [pairs[at][1] for at in taken], overflow == "truncate"), taken
                    taken, used = [], _length(query)
                taken.append(place)
                used += length
            yield Batch(query, [pairs[at][1] for at in taken], overflow == "truncate"), taken

    def _at_once(self) -> int:
        """How many requests may be under way: one alone while the protocol is not known."""
        return self._max_concurrency if self._endpoint.is_settled else 1

    def _start(self, batch: Batch, deadline: float, stopped: threading.Event) -> Future[list[Score]]:
        steps = self._endpoint.score(batch, deadline)
        try:
            return self._threads.submit(self._drive, steps, stopped)
        except RuntimeError as error:
            raise self._gone() from error

    def _drive(self, steps: Session[list[Score]], stopped: threading.Event) -> list[Score]:
        """Do what an exchange asks for, in this thread."""
        try:
            step = next(steps)
            while True:
                if self._closed.is_set():
                    raise self._gone()
                if stopped.is_set():
                    return []  # nobody waits any more
                if isinstance(step, Sleep):
                    stopped.wait(step.seconds)
                    step = steps.send(None)
                    continue
                try:
                    response = self._transport.send(step)
                except RemoteError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            steps.close()

    async def _adrive(self, steps: Session[list[Score]]) -> list[Score]:
        """Do what an exchange asks for, on the running loop."""
        try:
            step = next(steps)
            while True:
                if self._closed.is_set():
                    raise self._gone()
                if isinstance(step, Sleep):
                    await asyncio.sleep(step.seconds)
                    step = steps.send(None)
                    continue
                try:
                    response = await self._transport.asend(step)
                except RemoteError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            steps.close()

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"no answer from {self._host} within {self._timeout:g} s; raise timeout")

    def _gone(self) -> RerankerClosedError:
        return RerankerClosedError("the reranker is closed; open another one")


def _length(text: str) -> int:
    """Give the bytes that a text takes in a body, with its braces and names."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")) + 32


def _key(given: str | SecretStr | None, url: str) -> str | None:
    """Give the key to send to a URL: the one that is given, or ours, or at a vendor's host the vendor's."""
    vendor = vendor_of(url)
    variables = (KEY_VARIABLE, *(vendor.key_variables if vendor else ()))
    key = _revealed(given) or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if key is not None and not _fits_a_header(key):
        raise SettingsError("the api_key holds spaces at its ends or characters that no header may hold")
    return key


def _private_headers(key: str | None, given: Mapping[str, str | SecretStr]) -> dict[str, str]:
    """Merge the bearer token and the user's headers, whose names count whatever their case."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    for name, value in given.items():
        revealed = _revealed(value)
        if not HEADER_NAME.fullmatch(name) or name.lower() in OWN_HEADERS:
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
