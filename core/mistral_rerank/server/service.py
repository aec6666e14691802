"""The work of the routes: admission, scoring, timeouts and client disconnects, and the state of the model."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from starlette.exceptions import HTTPException

from mistral_rerank._telemetry import rerank_span, tracer
from mistral_rerank.inputs import CheckedPairs, check_pairs
from mistral_rerank.protocols.protocol import RerankReply
from mistral_rerank.protocols.vllm import write_score_reply
from mistral_rerank.reranker import call_options
from mistral_rerank.scores import usage_of
from mistral_rerank.server.errors import OVERLOADED_IS_429, is_temporary, route_path
from mistral_rerank.server.keys import ApiKeys
from mistral_rerank.server.models import Models
from mistral_rerank.server.prometheus import Metrics
from mistral_rerank.server.request_log import current_record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from starlette.requests import Request

    from mistral_rerank.protocols.protocol import RerankRequest
    from mistral_rerank.protocols.vllm import ScoreBody, ScoreReply
    from mistral_rerank.reranker import Overflow, Reranker
    from mistral_rerank.scores import Pair, Ranking, Score, Usage
    from mistral_rerank.server.keys import ApiKey
    from mistral_rerank.server.models import Model, Selection
    from mistral_rerank.server.settings import ServerSettings
    from mistral_rerank.settings import RerankSettings

T = TypeVar("T")
logger = logging.getLogger(__name__)

PARSED_AT_ONCE = 2
MOST_OF_TIMEOUT = 0.5
"""Part of the timeout that an admitted request may be estimated to take, since later requests take turns too."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between attempts to load the model; they double from the first to the longest."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status of a request whose client has disconnected; only the metrics show it."""


class ClientGoneError(Exception):
    """The client closed the connection before the response."""


class Service:
    """The models of a server with its limits.

    Attributes:
        settings: names, keys and limits.
        models: one reranker that is open, or several that are loaded on first use.
        keys: of the clients.
        metrics: the Prometheus metrics.
        created: start of the service, in seconds since 1970.
        in_flight: number of admitted requests: receiving their bodies, waiting or running.
        held_bytes: bytes of their bodies received so far.
        parsing: limits how many long bodies are parsed at once.
        draining: whether the server is shutting down and refuses new requests.
        failure: the error that makes the default model unusable, or None.

    """

    def __init__(self, rerankers: Reranker | Mapping[str, RerankSettings], settings: ServerSettings) -> None:
        if settings.telemetry:
            tracer()  # fails here rather than at the first request
        self.settings = settings
        self.keys = ApiKeys(settings.api_keys, settings.api_key_file)
        self.metrics = Metrics()
        self.models = Models(rerankers, settings, self.metrics)
        self.created = int(time.time())
        self.in_flight = 0
        self.held_bytes = 0
        self.parsing = asyncio.Semaphore(PARSED_AT_ONCE)
        self.draining = False
        self.failure: Exception | None = None
        self._loaded = False
        self._in_flight_by_key: Counter[str] = Counter()
        self.metrics.queue_size.set_function(lambda: self.in_flight)
        self.metrics.queue_tokens.set_function(lambda: sum(model.backlog.tokens for model in self.models.all))
        self.metrics.ready.set_function(lambda: self.not_ready is None)

    @property
    def not_ready(self) -> str | None:
        """The reason why the server is not ready; None when it is."""
        if self.draining:
            return "Service is shutting down."
        if self.failure is not None:
            return "Service has no usable model."
        return None if self._loaded else "Service is loading the model."

    async def warmup(self) -> None:
        """Load the default model; repeat it after temporary errors.

        Raises:
            Exception: the model is unusable; `failure` is set to it.

        """
        pause = FIRST_PAUSE
        while True:
            try:
                await self.models.default.load()
            except Exception as error:
                if not is_temporary(error):
                    self.failure = error
                    raise
                logger.warning("not ready (%s); trying again in %g s", error, pause)
            else:
                self._loaded = True
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    @contextmanager
    def admitted(self, path: str, key: ApiKey | None) -> Iterator[None]:
        """Count a request as in flight.

        Args:
            path: of the route, which decides the status of a refusal.
            key: of the client; None on a server without keys.

        Raises:
            HTTPException: there are too many requests, or the server is shutting down.

        """
        if self.draining:
            raise self.rejection("draining", 503, "the server is shutting down; send this to another")
        if self.in_flight >= self.settings.max_requests:
            raise self.overloaded("queue_full", path, f"{self.in_flight} requests are waiting; try again later")
        name = key.name if key else ""
        if key and self._in_flight_by_key[name] >= max(1, int(key.share * self.settings.max_requests)):
            waiting = self._in_flight_by_key[name]
            raise self.overloaded("key_share", path, f"{waiting} requests of this key are waiting; try again later")
        self.in_flight += 1
        self._in_flight_by_key[name] += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._in_flight_by_key[name] -= 1

    async def rerank(self, rerank_request: RerankRequest, request: Request) -> RerankReply:
        """Rank the passages of a request.

        Raises:
            HTTPException: unknown model, too many passages, or timeout.
            RerankError: from the reranker.
            ClientGoneError: the client has disconnected.

        """
        query, passages, top_n = rerank_request.query, rerank_request.passages, rerank_request.top_n
        selection = self._select(rerank_request.model, len(passages))
        instruction, adapter = rerank_request.instruction, selection.adapter

        async def rank(reranker: Reranker) -> Ranking:
            ranking = await reranker.arank(
                query,
                passages,
                top_n=top_n,
                overflow=_overflow(rerank_request.truncate),
                instruction=instruction,
                limits=rerank_request.limits,
                adapter=adapter,
            )
            if rerank_request.highlight:
                texts = [ranked.text for ranked in ranking]
                ranking.mark(await reranker.ahighlight(query, texts, instruction=instruction, adapter=adapter))
            return ranking

        async def traced_rank(reranker: Reranker) -> Ranking:
            with rerank_span(query, passages, model=selection.name, top_n=top_n, content=False) as report:
                return report(await rank(reranker))

        work = traced_rank if self.settings.telemetry else rank
        pairs = [(query, passage) for passage in passages]
        ranking = await self._while_connected(work, selection.model, pairs, request)
        tokens = self._count_tokens(ranking.usage)
        return RerankReply(tuple(ranking), selection.name, uuid.uuid4().hex, tokens)

    async def score(self, body: ScoreBody, request: Request) -> ScoreReply:
        """Score the pairs of a request, in its order; errors as for `rerank`."""
        pairs = CheckedPairs(check_pairs(body.pairs()))
        selection = self._select(body.model, len(pairs))
        overflow = _overflow(body.truncate_prompt_tokens is not None)

        async def score(reranker: Reranker) -> list[Score]:
            options = call_options(reranker.ascore_pairs, overflow, body.instruction, None, selection.adapter)
            if not self.settings.telemetry:
                return await reranker.ascore_pairs(pairs, **options)
            texts = [passage for _, passage in pairs]
            with rerank_span(pairs[0][0], texts, model=selection.name, top_n=None, content=False):
                return await reranker.ascore_pairs(pairs, **options)

        scores = await self._while_connected(score, selection.model, pairs, request)
        self._count_tokens(usage_of(scores))
        return write_score_reply(
            scores,
            unit=body.unit,
            model=selection.name,
            reply_id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
        )

    async def _while_connected(
        self, work: Callable[[Reranker], Awaitable[T]], model: Model, pairs: Sequence[Pair], request: Request
    ) -> T:
        """Await a model's work on pairs until the timeout or until the client disconnects; then cancel it.

        Work that would not be done before the timeout is not begun.
        """
        timeout, record = self.settings.timeout, current_record()
        record.passages = len(pairs)
        self.metrics.passages.observe(len(pairs))
        tokens = model.backlog.estimate(pairs)
        if (seconds := model.backlog.seconds_until_answer(tokens)) > MOST_OF_TIMEOUT * timeout:
            late = f"the answer would take about {seconds:.0f} s of work; send fewer passages, or try later"
            raise self.overloaded("deadline", route_path(request.scope), late)
        start = time.perf_counter()

        async def work_on_model() -> T:
            nonlocal start
            async with model.use() as reranker:
                start = time.perf_counter()  # after the load
                return await work(reranker)

        with model.backlog.holding(tokens):
            task, disconnected = asyncio.ensure_future(work_on_model()), asyncio.ensure_future(_disconnected(request))
            try:
                done, _ = await asyncio.wait({task, disconnected}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if task in done:
                    return task.result()
                self.metrics.cancelled.inc(len(pairs))
                if disconnected in done:
                    self.metrics.rejections.labels("disconnected").inc()
                    raise ClientGoneError
                late = f"no answer within {timeout:g} s; send fewer passages, or try again"
                raise self.rejection("timeout", 504, late)
            finally:
                record.compute_ms = (time.perf_counter() - start) * 1000 - (record.queue_ms or 0)
                task.cancel()
                disconnected.cancel()

    def _count_tokens(self, usage: Usage) -> int:
        self.metrics.prompt_tokens.inc(usage.tokens)
        current_record().tokens = usage.tokens
        return usage.tokens

    def find_model(self, name: str | None) -> Selection:
        """Give the model, or the adapter, that a request names.

        Raises:
            HTTPException: 404, the name is not served.

        """
        selection = self.models.find(name)
        if selection is None:
            raise self.rejection("model", 404, f"no such model; there is {', '.join(self.models.known)}")
        return selection

    def rejection(
        self, reason: str, status: int, message: str, *, close: bool = False, retry_after: int = 1
    ) -> HTTPException:
        """Count a refusal, and make its exception. `close` closes the connection, because the body is not read."""
        self.metrics.rejections.labels(reason).inc()
        headers = {"Retry-After": str(retry_after)} if status in (429, 503) else {}
        return HTTPException(status, message, (headers | ({"Connection": "close"} if close else {})) or None)

    def overloaded(self, reason: str, path: str, message: str, *, close: bool = False) -> HTTPException:
        """Make a `rejection` with the status that clients of the path's protocol expect from a busy server."""
        status = 429 if path in OVERLOADED_IS_429 else 503
        retry_after = max(model.backlog.retry_after() for model in self.models.all)
        return self.rejection(reason, status, message, close=close, retry_after=retry_after)

    def _select(self, name: str | None, passages: int) -> Selection:
        """Check the model's name and the number of passages of a request."""
        selection = self.find_model(name)
        if len(self.models.selections) > 1:
            current_record().model = selection.name
        limit = self.settings.max_passages
        if passages > limit:
            raise self.rejection("passages", 422, f"send at most {limit} passages at once, not {passages}")
        return selection


def _overflow(truncate: bool) -> Overflow | None:
    return None if truncate else "error"  # None: the reranker's setting


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
