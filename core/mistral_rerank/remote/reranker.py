"""The reranker behind an HTTP endpoint."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import time
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import SecretStr
from typing_extensions import override

from mistral_rerank.errors import SettingsError
from mistral_rerank.inputs import TextPairs
from mistral_rerank.protocols.urls import candidates, vendor_of
from mistral_rerank.remote.endpoint import Batch, Endpoint
from mistral_rerank.remote.retries import RateLimit, Retries
from mistral_rerank.remote.transport import Transport
from mistral_rerank.reranker import Overflow, PassageLimits, ProtocolName, Reranker, Unit
from mistral_rerank.scores import Pair, Score, Scores, Usage

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

    import httpx

KEY_VARIABLE = "MISTRAL_RERANK_API_KEY"

NO_CHUNKS = "overflow='chunk' needs the local backend; give 'truncate' or 'error'"

SMALLEST_SPLIT = 32
"""Fewest passages of one of several concurrent requests."""

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
RESERVED_HEADERS = frozenset({"content-length", "content-type", "host", "transfer-encoding", "x-request-id"})


class RemoteReranker(Reranker):
    """Scores pairs at an endpoint: NVIDIA's API, a NIM, this package's server, vLLM, TEI, Cohere, Jina, Voyage.

    The first request is sent when the first pair is scored. Safe to use from threads and any number of event loops.
    A pickle holds the settings without the key, the headers, the transport and the SSL context.

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
        transport: an httpx transport in place of the network.

    Raises:
        SettingsError: a setting is invalid.

    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        protocol: Literal["auto", ProtocolName] = "auto",
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
        score_unit: Literal["auto", Unit] = "auto",
        headers: Mapping[str, str | SecretStr] | None = None,
        verify: bool | ssl.SSLContext = True,
        proxy: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
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
        self._transport = Transport(connect_timeout=connect_timeout, verify=verify, proxy=proxy, transport=transport)
        self._endpoint = Endpoint(
            self._transport,
            routes,
            model=model,
            private_headers=private,
            unit=None if score_unit == "auto" else score_unit,
            retries=Retries(retries) if isinstance(retries, int) else retries,
            rate=RateLimit(requests_per_minute),
            read_timeout=read_timeout,
        )

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
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """See `Reranker.score_pairs`.

        Raises:
            RemoteError: one of its kinds; there is never a partial result.

        """
        return self._score_within(
            self._timeout, pairs, overflow=overflow, instruction=instruction, limits=limits, adapter=adapter
        )

    async def ascore_pairs(
        self,
        pairs: Sequence[Pair],
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        """See `Reranker.ascore_pairs`; cancelling closes the connections of the call. Errors as `score_pairs`'s."""
        return await self._ascore_within(
            self._timeout, pairs, overflow=overflow, instruction=instruction, limits=limits, adapter=adapter
        )

    @override
    def _score_within(self, seconds: float, pairs: Sequence[Pair], **options: Any) -> list[Score]:
        return self._transport.run(self._ascore_within(seconds, pairs, **options))

    @override
    def _ascore_within(self, seconds: float, pairs: Sequence[Pair], **options: Any) -> Coroutine[Any, Any, list[Score]]:
        return self._score(TextPairs(pairs), time.monotonic() + min(seconds, self._timeout), **options)

    async def _score(
        self,
        call: TextPairs,
        deadline: float,
        *,
        overflow: Overflow | None = None,
        instruction: str | None = None,
        limits: PassageLimits | None = None,
        adapter: str | None = None,
    ) -> list[Score]:
        overflow, instruction = overflow or self._overflow, instruction or self._instruction
        batches = self._batches(call.pairs, overflow, instruction, limits, adapter)
        scores: dict[int, Score] = {}
        usage = Usage()

        async def score_batches(*, until_known: bool = False) -> None:
            nonlocal usage
            for batch, indices in batches:
                part = await self._endpoint.score(batch, deadline)
                scores.update(zip(indices, part, strict=True))
                usage += part.usage
                if until_known and self._endpoint.is_known:
                    return

        if not self._endpoint.is_known:
            await score_batches(until_known=True)  # one request at a time
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._max_concurrency):
                    group.create_task(score_batches())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        complete = Scores(call.complete(self._endpoint.with_unit([scores[index] for index in range(len(call.pairs))])))
        complete.usage = usage
        return complete

    def close(self) -> None:
        """Close the connections; waiting calls of threads fail with RerankerClosedError."""
        super().close()
        self._transport.close()

    async def aclose(self) -> None:
        """`close`, and the running loop's connections too."""
        super().close()
        await self._transport.aclose()

    def _batches(
        self,
        pairs: Sequence[Pair],
        overflow: Overflow,
        instruction: str | None,
        limits: PassageLimits | None,
        model: str | None,
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Split a call into batches of one question each, within the limits; also give the indices of their pairs."""
        if overflow == "chunk":
            raise SettingsError(NO_CHUNKS)
        limit = self._max_passages or self._endpoint.protocol.max_passages
        limit = min(limit, self._endpoint.max_passages or limit)
        size = min(limit, max(SMALLEST_SPLIT, -(-len(pairs) // self._max_concurrency)))
        by_query: dict[str, list[int]] = {}
        for index, (query, _) in enumerate(pairs):
            by_query.setdefault(query, []).append(index)

        def batch(query: str, indices: list[int]) -> Batch:
            texts = [pairs[i][1] for i in indices]
            return Batch(query, texts, overflow == "truncate", instruction, limits, model)

        for query, query_indices in by_query.items():
            indices: list[int] = []
            used_bytes = _length(query)
            for index in query_indices:
                length = _length(pairs[index][1])
                if indices and (len(indices) == size or used_bytes + length > self._endpoint.max_bytes):
                    yield batch(query, indices), indices
                    indices, used_bytes = [], _length(query)
                indices.append(index)
                used_bytes += length
            yield batch(query, indices), indices


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
