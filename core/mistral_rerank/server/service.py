"""The work of the routes: admission, scoring, timeouts and client disconnects, and the state of the model."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from starlette.exceptions import HTTPException

from mistral_rerank._telemetry import rerank_span, tracer
from mistral_rerank.errors import DeadlineExceededError, RemoteError, SettingsError
from mistral_rerank.protocols.protocol import RerankReply
from mistral_rerank.protocols.vllm import write_score_reply
from mistral_rerank.remote.error_mapping import RETRYABLE, is_retryable
from mistral_rerank.remote.reranker import RemoteReranker
from mistral_rerank.scores import usage_of
from mistral_rerank.server.backlog import Backlog
from mistral_rerank.server.errors import OVERLOADED_IS_429, route_path
from mistral_rerank.server.keys import ApiKeys
from mistral_rerank.server.prometheus import Metrics
from mistral_rerank.server.request_log import current_record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from starlette.requests import Request

    from mistral_rerank.protocols.protocol import RerankRequest
    from mistral_rerank.protocols.vllm import ScoreBody, ScoreReply
    from mistral_rerank.reranker import Overflow, Reranker
    from mistral_rerank.scores import Pair, Ranking, Score, Usage
    from mistral_rerank.server.keys import ApiKey
    from mistral_rerank.server.settings import ServerSettings

T = TypeVar("T")
logger = logging.getLogger(__name__)

UNNAMED = "rerank"
"""Name of the model of an endpoint for which no model was set."""
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
    """One reranker with its limits.

    Attributes:
        settings: names, keys and limits.
        keys: of the clients.
        metrics: the Prometheus metrics.
        created: start of the service, in seconds since 1970.
        in_flight: number of admitted requests: receiving their bodies, waiting or running.
        held_bytes: bytes of their bodies received so far.
        parsing: limits how many long bodies are parsed at once.
        draining: whether the server is shutting down and refuses new requests.
        failure: the error that makes the model unusable, or None.

    """

    def __init__(self, reranker: Reranker, settings: ServerSettings) -> None:
        if settings.telemetry:
            tracer()  # fails here rather than at the first request
        self.settings = settings
        self.keys = ApiKeys(settings.api_keys, settings.api_key_file)
        self._backlog = Backlog(reranker.max_length)
        self.metrics = Metrics(self._backlog)
        self.created = int(time.time())
        self.in_flight = 0
        self.held_bytes = 0
        self.parsing = asyncio.Semaphore(PARSED_AT_ONCE)
        self.draining = False
        self.failure: Exception | None = None
        self._loaded = False
        self._reranker = reranker
        if taken := {self.model_id, *settings.aliases} & {*reranker.adapters}:
            raise SettingsError(f"{', '.join(sorted(taken))} names the model and an adapter; rename the adapter")
        self._in_flight_by_key: Counter[str] = Counter()
        self.metrics.watch(queue_size=lambda: self.in_flight, is_ready=lambda: self.not_ready is None)
        reranker.observe(self.metrics)

    @property
    def model_id(self) -> str:
        """Name of the model in replies and in the list of models: no path and no address."""
        if self.settings.model_id:
            return self.settings.model_id
        if isinstance(self._reranker, RemoteReranker) and self._reranker.model is None:
            return UNNAMED
        name = self._reranker.model_name
        return Path(name).resolve().name if Path(name).exists() else name.partition("@")[0]  # without a revision

    @property
    def not_ready(self) -> str | None:
        """The reason why the server is not ready; None when it is."""
        if self.draining:
            return "Service is shutting down."
        if self.failure is not None:
            return "Service has no usable model."
        return None if self._loaded else "Service is loading the model."

    async def warmup(self) -> None:
        """Load the model by scoring one short pair; repeat it after temporary errors.

        Raises:
            Exception: the model is unusable; `failure` is set to it.

        """
        pause = FIRST_PAUSE
        while True:
            try:
                await self._reranker.ascore_pairs([("warm", "up")])
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
        query, passages = rerank_request.query, rerank_request.passages
        self._check(rerank_request.model, len(passages))
        overflow = _overflow(rerank_request.truncate)

        top_n, model = rerank_request.top_n, self.model_of(rerank_request.model)
        options, limits = self._options(rerank_request.model, rerank_request.instruction), rerank_request.limits

        async def rank() -> Ranking:
            ranking = await self._reranker.arank(
                query, passages, top_n=top_n, overflow=overflow, limits=limits, **options
            )
            if rerank_request.highlight:
                texts = [ranked.text for ranked in ranking]
                ranking.mark(await self._reranker.ahighlight(query, texts, **options))
            return ranking

        async def traced_rank() -> Ranking:
            with rerank_span(query, passages, model=model, top_n=top_n, content=False) as report:
                return report(await rank())

        work = traced_rank if self.settings.telemetry else rank
        ranking = await self._while_connected(work, [(query, passage) for passage in passages], request)
        tokens = self._count_tokens(ranking.usage)
        return RerankReply(tuple(ranking), model, uuid.uuid4().hex, tokens)

    async def score(self, body: ScoreBody, request: Request) -> ScoreReply:
        """Score the pairs of a request, in its order; errors as for `rerank`."""
        pairs = body.pairs()
        self._check(body.model, len(pairs))
        overflow = _overflow(body.truncate_prompt_tokens is not None)

        model = self.model_of(body.model)

        async def score() -> list[Score]:
            options = self._options(body.model, body.instruction)
            if not self.settings.telemetry:
                return await self._reranker.ascore_pairs(pairs, overflow=overflow, **options)
            texts = [passage for _, passage in pairs]
            with rerank_span(pairs[0][0], texts, model=model, top_n=None, content=False):
                return await self._reranker.ascore_pairs(pairs, overflow=overflow, **options)

        scores = await self._while_connected(score, pairs, request)
        self._count_tokens(usage_of(scores))
        return write_score_reply(
            scores,
            unit=body.unit,
            model=model,
            reply_id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
        )

    async def _while_connected(self, work: Callable[[], Awaitable[T]], pairs: Sequence[Pair], request: Request) -> T:
        """Await the work on pairs until the timeout or until the client disconnects; then cancel it.

        Work that would not be done before the timeout is not begun.
        """
        timeout, record = self.settings.timeout, current_record()
        record.passages = len(pairs)
        self.metrics.passages.observe(len(pairs))
        tokens = self._backlog.estimate(pairs)
        if (seconds := self._backlog.seconds_until_answer(tokens)) > MOST_OF_TIMEOUT * timeout:
            late = f"the answer would take about {seconds:.0f} s of work; send fewer passages, or try later"
            raise self.overloaded("deadline", route_path(request.scope), late)
        start = time.perf_counter()
        with self._backlog.holding(tokens):
            task, disconnected = asyncio.ensure_future(work()), asyncio.ensure_future(_disconnected(request))
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

    @property
    def model_ids(self) -> tuple[str, ...]:
        """Names of the model and of its adapters."""
        return self.model_id, *self._reranker.adapters

    def model_of(self, name: str | None) -> str:
        """Give the name in replies of the model, or of the adapter that a request names."""
        return name if name is not None and name in self._reranker.adapters else self.model_id

    def _options(self, model: str | None, instruction: str | None) -> dict[str, Any]:
        """Give the options of a call; other rerankers may not know all of them."""
        adapter = model if model in self._reranker.adapters else None
        options = {"instruction": instruction, "adapter": adapter}
        return {name: value for name, value in options.items() if value is not None}

    def check_model(self, name: str | None) -> None:
        """Refuse the name of a model that is not served.

        Raises:
            HTTPException: 404.

        """
        known = (self.model_id, *self.settings.aliases, *self._reranker.adapters)
        if name is not None and name not in known:
            raise self.rejection("model", 404, f"no such model; there is {', '.join(known)}")

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
        return self.rejection(reason, status, message, close=close, retry_after=self._backlog.retry_after())

    def _check(self, model: str | None, passages: int) -> None:
        self.check_model(model)
        limit = self.settings.max_passages
        if passages > limit:
            raise self.rejection("passages", 422, f"send at most {limit} passages at once, not {passages}")


def is_temporary(error: BaseException | None) -> bool:
    """Whether an error of loading a model, or of an endpoint, may not occur again later."""
    while error is not None:
        if isinstance(error, RemoteError):
            return is_retryable(error) or isinstance(error, DeadlineExceededError)
        if type(error).__name__ == "OfflineModeIsEnabled":
            return False  # the model hub's client may not use the network
        if isinstance(error, ConnectionError | TimeoutError | MemoryError | httpx.TransportError):
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in RETRYABLE:
            return True  # an error of httpx, or of the model hub's client
        if type(error).__name__ == "OutOfMemoryError":
            return True  # torch's; the server does not import it
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _overflow(truncate: bool) -> Overflow | None:
    return None if truncate else "error"  # None: the reranker's setting


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
