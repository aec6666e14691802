"""What every route does: take a request in, have it ranked, and give up when nobody waits for the answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from mistral_rerank.protocols.contract import RerankReply
from mistral_rerank.server.metrics import Metrics
from mistral_rerank.telemetry import rerank_span, tracer

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.requests import Request

    from mistral_rerank.protocols.contract import RerankRequest
    from mistral_rerank.reranker import Overflow, RankedPassage, Reranker
    from mistral_rerank.server.settings import ServerSettings

CLIENT_CLOSED_REQUEST = 499
"""nginx's status of a request whose client has gone; it reaches the metrics alone."""


class ClientGoneError(Exception):
    """The client closed the connection before its answer was there."""


class Service:
    """One reranker with its limits.

    Attributes:
        settings: names, keys and limits.
        metrics: what is counted.
        created: when the service began, in seconds since 1970.
        in_flight: how many requests wait or run.
        draining: whether the server is on its way down: it takes no new requests.
        failure: why the model cannot be used, or None.

    """

    def __init__(self, reranker: Reranker, settings: ServerSettings) -> None:
        if settings.telemetry:
            tracer()  # fails here rather than at the first request
        self.settings = settings
        self.metrics = Metrics()
        self.metrics.watch_queue(lambda: self.in_flight)
        self.created = int(time.time())
        self.in_flight = 0
        self.draining = False
        self.failure: Exception | None = None
        self._loaded = False
        self._reranker = reranker
        reranker.observe(self.metrics)

    @property
    def model_id(self) -> str:
        """What the model is called in replies and in the list of models."""
        return self.settings.model_id or self._reranker.model_name

    @property
    def not_ready(self) -> str | None:
        """Why requests should go elsewhere; None when they are welcome."""
        if self.draining:
            return "Service is shutting down."
        if self.failure is not None:
            return "Service has no usable model."
        return None if self._loaded else "Service is loading the model."

    async def warmup(self) -> None:
        """Load the model by scoring one short pair."""
        try:
            await self._reranker.ascore_pairs([("warm", "up")])
        except Exception as error:
            self.failure = error
            raise
        self._loaded = True

    async def rerank(self, asked: RerankRequest, request: Request) -> RerankReply:
        """Rank the passages of a request.

        Raises:
            HTTPException: the model is another, there are too many passages or requests, or time is over.
            RerankError: the reranker's own.
            ClientGoneError: nobody waits any more.

        """
        self._check_model(asked.model)
        most = self.settings.max_passages
        if len(asked.passages) > most:
            raise self._rejection("passages", 422, f"send at most {most} passages at once, not {len(asked.passages)}")
        try:
            "".join((asked.query, *asked.passages)).encode()
        except UnicodeEncodeError:
            raise self._rejection(
                "text", 422, "a text holds half of a surrogate pair, which is no character"
            ) from None
        if self.draining:
            raise self._rejection("draining", 503, "the server is shutting down; send this to another")
        if self.in_flight >= self.settings.max_requests:
            raise self._rejection("queue_full", 503, f"{self.in_flight} requests are waiting; try again")
        self.in_flight += 1
        try:
            ranking = await self._while_connected(self._rank(asked), request)
        finally:
            self.in_flight -= 1
        tokens = sum(place.score.tokens for place in ranking)
        self.metrics.prompt_tokens.inc(tokens)
        return RerankReply(tuple(ranking[: asked.top_n]), self.model_id, uuid.uuid4().hex, tokens)

    async def _rank(self, asked: RerankRequest) -> list[RankedPassage]:
        overflow: Overflow | None = None if asked.truncate else "error"  # None: as whoever runs the server chose
        if not self.settings.telemetry:
            return await self._reranker.arank(asked.query, asked.passages, overflow=overflow)
        with rerank_span(
            asked.query, asked.passages, model=self.model_id, top_n=asked.top_n, content=False
        ) as report:
            ranking = await self._reranker.arank(asked.query, asked.passages, overflow=overflow)
            report(ranking[: asked.top_n])
            return ranking

    async def _while_connected(self, work: Awaitable[list[RankedPassage]], request: Request) -> list[RankedPassage]:
        """Wait for work as long as its client does; work that is given up leaves the reranker's queue."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            done, _ = await asyncio.wait(
                {task, gone}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                return task.result()
            if gone in done:
                self.metrics.rejections.labels("disconnected").inc()
                raise ClientGoneError
            seconds = f"{self.settings.timeout:g}"
            raise self._rejection("timeout", 504, f"no answer within {seconds} s; send fewer passages, or try again")
        finally:
            task.cancel()
            gone.cancel()

    def _check_model(self, asked: str | None) -> None:
        known = (self.model_id, *self.settings.aliases)
        if asked is not None and asked not in known:
            raise self._rejection("model", 404, f"no such model; there is {', '.join(known)}")

    def _rejection(self, reason: str, status: int, message: str) -> HTTPException:
        self.metrics.rejections.labels(reason).inc()
        return HTTPException(status, message, {"Retry-After": "1"} if status == 503 else None)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
