"""An endpoint: how a batch is scored there, and what earlier replies have shown about it.

`Endpoint.score` detects the protocol, retries, polls, and splits batches that are refused as too large.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mistral_rerank._version import __version__
from mistral_rerank.errors import (
    InvalidInputError,
    InvalidReplyError,
    NotFoundError,
    RemoteDeadlineExceededError,
    RemoteError,
    RemoteInputTooLongError,
    RequestTooLargeError,
)
from mistral_rerank.protocols import RerankRequest, WireProtocol
from mistral_rerank.protocols.replies import from_probability, is_probability, read_scores
from mistral_rerank.protocols.urls import HOSTED_NVIDIA, shown_url, sibling_url
from mistral_rerank.remote.error_mapping import is_error_body, passage_limit, redact, says_unknown_model, to_error
from mistral_rerank.remote.retries import with_retries
from mistral_rerank.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mistral_rerank.remote.retries import RateLimit, Retries
    from mistral_rerank.remote.transport import Response, Transport
    from mistral_rerank.reranker import PassageLimits, Unit
    from mistral_rerank.scores import Score

logger = logging.getLogger(__name__)

WRONG_ROUTE = frozenset({200, 400, 401, 403, 404, 405, 422})
"""Statuses after which the next protocol is tried: those of NVIDIA's own client, those of gateways that answer 401 or
403 for unknown paths, and 200 with an error in its body, which LM Studio gives for an unknown path."""

AMBIGUOUS = ((400, 422), (401, 403), (200,))
"""Statuses of refusals, from those of an existing route to those that any path may have; 404 and 405 come last."""

ENOUGH_SCORES = 3
"""This many scores in [0, 1] from an endpoint that was asked for logits are taken to be probabilities."""

STATUS_URL = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status"
"""Where NVIDIA's hosted API gives the result of a request that it answered with 202."""
POLL_SECONDS = 0.1

HEADERS = {
    "Accept": "application/json",
    "Content-Type": "application/json",
    "User-Agent": f"mistral-rerank/{__version__}",
}


@dataclass(frozen=True, slots=True)
class Batch:
    """Passages of one question, with the options of the call.

    Attributes:
        truncate: whether a pair over the model's limit is truncated or refused.
        instruction: None for the endpoint's default.
        limits: None for none.
        model: None for the endpoint's model.

    """

    query: str
    passages: Sequence[str]
    truncate: bool
    instruction: str | None = None
    limits: PassageLimits | None = None
    model: str | None = None


class Endpoint:
    """One endpoint, with its protocol, model name and limits as far as they are known.

    Args:
        transport: sends the requests.
        candidates: protocols with their URLs, in the order to try; one when the protocol is known.
        model: its name; None for the model that the endpoint serves.
        private_headers: the key and the user's headers; their values are secrets.
        unit: of the scores; None for the protocol's.
        retries: of failed requests.
        rate: the limit of requests.
        read_timeout: as in `RemoteReranker`.

    Attributes:
        max_passages: most passages of a request; None unless the endpoint has refused more.

    """

    def __init__(
        self,
        transport: Transport,
        candidates: tuple[tuple[WireProtocol, str], ...],
        *,
        model: str | None,
        private_headers: Mapping[str, str],
        unit: Unit | None,
        retries: Retries,
        rate: RateLimit,
        read_timeout: float | None,
    ) -> None:
        self._transport, self._candidates, self._model = transport, candidates, model
        self._private_headers, self._unit = private_headers, unit
        self._retries, self._rate, self._read_timeout = retries, rate, read_timeout
        self._secrets = [value.removeprefix("Bearer ") for value in private_headers.values()]
        self._knows_model = model is not None
        self.max_passages: int | None = None
        self._max_bytes: int | None = None
        self._calibrated = self._named = True  # until a reply shows otherwise
        self._detected_unit: Unit | None = None

    @property
    def protocol(self) -> WireProtocol:
        """The protocol in use, or the first to be tried."""
        return self._candidates[0][0]

    @property
    def max_bytes(self) -> int:
        """Most bytes of a request."""
        return min(self.protocol.max_bytes, self._max_bytes or self.protocol.max_bytes)

    @property
    def is_known(self) -> bool:
        """Whether the protocol is known, and the model's name where the protocol needs it."""
        return len(self._candidates) == 1 and not self._needs_model(*self._candidates[0])

    async def score(self, batch: Batch, deadline: float) -> Scores:
        """Score one batch, of at most the protocol's number of passages, before `deadline` on `time.monotonic`'s clock.

        Raises:
            RemoteError: one of its kinds, when no usable reply came in time.

        """
        size = len(batch.passages)
        if self.max_passages is None or size <= self.max_passages:
            try:
                return await self._try_candidates(batch, deadline)
            except RequestTooLargeError as error:
                if size == 1:
                    raise
                self._store_limit(error, batch)
        step = min(self.max_passages or size, -(-size // 2))
        scores = Scores()
        for start in range(0, size, step):
            part = await self.score(replace(batch, passages=batch.passages[start : start + step]), deadline)
            scores += part
            scores.usage += part.usage
        return scores

    def with_unit(self, scores: list[Score]) -> list[Score]:
        """Decide between logits and probabilities where the replies of a call left it open; warn once.

        Raw logits that all lie in [0, 1] are rare. An endpoint that ignores the request for logits gives
        probabilities, to which the sigmoid must not be applied again.
        """
        if self._calibrated or not scores:
            return scores
        host = urlsplit(self._candidates[0][1]).netloc
        if not self._named and self._unit is None and self._detected_unit != "logit":
            if not all(is_probability(score.logit) for score in scores):
                self._detected_unit = "logit"
            elif self._detected_unit == "probability" or len(scores) >= ENOUGH_SCORES:
                self._detected_unit = "probability"
                _warn_once(
                    f"{host} was asked for logits, but all of its scores lie in [0, 1], so they are taken to be "
                    "probabilities; set score_unit='probability', or 'logit' if they are logits"
                )
                return [from_probability(score.logit) for score in scores]
            else:
                return scores
        _warn_once(
            f"{host} gives logits without a calibration: a probability is the sigmoid of its logit, so a min_score "
            "that was chosen for another model or endpoint means something else here"
        )
        return scores

    def _store_limit(self, error: RequestTooLargeError, batch: Batch) -> None:
        """Store the limit that a refusal states or implies, for this call and later ones."""
        limit = passage_limit(error, len(batch.passages))
        if limit is not None:
            self.max_passages = min(limit, self.max_passages or limit)
        else:
            size = len(batch.query.encode()) + sum(len(passage.encode()) for passage in batch.passages)
            self._max_bytes = min(size // 2, self._max_bytes or size)

    async def _try_candidates(self, batch: Batch, deadline: float) -> Scores:
        """Score a batch with the first protocol and URL that give scores, and keep to these."""
        candidates, refusals = self._candidates, []
        for protocol, url in candidates:
            try:
                scores = await self._rerank(protocol, url, batch, deadline)
            except (RemoteInputTooLongError, RequestTooLargeError):
                self._candidates = ((protocol, url),)  # it understood the request
                raise
            except RemoteError as error:
                if len(candidates) == 1 or error.status not in WRONG_ROUTE or isinstance(error, InvalidReplyError):
                    raise
                if (batch.model or self._model) is not None and says_unknown_model(error, url):
                    raise  # other routes may ignore the model's name, and would score with another model
                refusals.append(error)
            else:
                self._candidates = ((protocol, url),)
                self._knows_model = True  # or needs none
                return scores
        best = min(refusals, key=_ambiguity)
        if _ambiguity(best) < len(AMBIGUOUS):
            raise best
        tried = ", ".join(shown_url(url) for _, url in candidates)
        raise NotFoundError(
            f"no rerank API here, or not this model; tried {tried}; the first said: {refusals[0]}",
            status=refusals[0].status,
            request_id=refusals[0].request_id,
        )

    async def _rerank(self, protocol: WireProtocol, url: str, batch: Batch, deadline: float) -> Scores:
        """Score a batch with one protocol, with retries."""
        headers = {**HEADERS, **self._private_headers, "X-Request-Id": uuid.uuid4().hex}
        if self._needs_model(protocol, url):
            await self._fetch_model(url, headers, deadline)
        if batch.instruction is not None and not protocol.takes_instruction:
            raise InvalidInputError(
                f"the protocol {protocol.name!r} has no instruction; leave it out, or put it into the question"
            )
        if batch.limits is not None and not protocol.takes_limits:
            raise InvalidInputError(f"the protocol {protocol.name!r} has no limits of a passage; leave them out")
        unit = self._unit or protocol.unit
        request = RerankRequest(
            batch.query,
            tuple(batch.passages),
            model=batch.model or self._model,
            truncate=batch.truncate,
            unit=unit,
            instruction=batch.instruction,
            limits=batch.limits,
        )
        try:
            body = json.dumps(protocol.write_request(request), ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError:
            raise InvalidInputError("a text holds half of a surrogate pair, which is no Unicode character") from None

        async def attempt() -> Scores:
            response = await self._send("POST", url, headers, body, deadline)
            while response.status == 202:
                response = await self._poll(response, url, headers, deadline)
            if response.status == 200:
                try:
                    reply = read_scores(response.content, count=len(batch.passages), unit=unit)
                except InvalidReplyError as error:
                    if not is_error_body(response.content):
                        request_id = response.headers.get("x-request-id", headers["X-Request-Id"])
                        raise InvalidReplyError(
                            f"{shown_url(url)} answered 200 with {error}", status=200, request_id=request_id
                        ) from None
                else:
                    self._calibrated &= reply.calibrated
                    self._named &= reply.named
                    scores = Scores(reply.scores)
                    scores.usage = reply.usage if reply.usage.tokens else replace(reply.usage, tokens=_tokens(response))
                    return scores
            hide = partial(
                redact, secrets=self._secrets, texts=(batch.query, batch.instruction or batch.query, *batch.passages)
            )
            raise to_error(response, url=url, request_id=headers["X-Request-Id"], hide=hide)

        return await with_retries(attempt, self._retries, deadline=deadline)

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None, deadline: float
    ) -> Response:
        """Send one request, within the rate limit."""
        wait = self._rate.reserve(time.monotonic(), before=deadline)
        if wait is None:
            raise RemoteDeadlineExceededError(
                "the limit of requests_per_minute leaves no time for this call; raise it, timeout or deadline"
            )
        if wait:
            await asyncio.sleep(wait)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise RemoteDeadlineExceededError(
                f"the time of the call was over before a request to {shown_url(url)}; raise timeout or deadline"
            )
        timeout = remaining if self._read_timeout is None else min(remaining, self._read_timeout)
        return await self._transport.send(method, url, headers, content, timeout=timeout, deadline=deadline)

    async def _poll(self, response: Response, url: str, headers: Mapping[str, str], deadline: float) -> Response:
        """Ask once for the result of a request that NVIDIA's hosted API has accepted (202)."""
        identity = response.headers.get("nvcf-reqid", "")
        if urlsplit(url).hostname != HOSTED_NVIDIA or not identity.replace("-", "").isalnum():
            raise InvalidReplyError(
                f"{shown_url(url)} answered 202 without a result, which is polled for only at NVIDIA's hosted API; "
                "check base_url"
            )
        await asyncio.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        return await self._send("GET", f"{STATUS_URL}/{identity}", headers, None, deadline)

    def _needs_model(self, protocol: WireProtocol, url: str) -> bool:
        return not self._knows_model and protocol.name == "nvidia" and urlsplit(url).hostname != HOSTED_NVIDIA

    async def _fetch_model(self, url: str, headers: Mapping[str, str], deadline: float) -> None:
        """Fetch the name of the served model; an endpoint without such a route may need no name."""
        try:
            response = await self._send("GET", sibling_url(url, "models"), headers, None, deadline)
            models = json.loads(response.content)["data"] if response.status == 200 else []
            self._model = next((entry["id"] for entry in models if isinstance(entry["id"], str)), None)
            self._knows_model = self._model is not None
        except RemoteDeadlineExceededError:
            raise
        except (RemoteError, ValueError, LookupError, TypeError, RecursionError):
            return


def _tokens(response: Response) -> int:
    """Give the number of tokens in TEI's header; 0 if there is none."""
    value = response.headers.get("x-compute-tokens", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0


def _ambiguity(error: RemoteError) -> int:
    """Rank a refusal by how little it says about the route; the lowest is reported."""
    return next((rank for rank, statuses in enumerate(AMBIGUOUS) if error.status in statuses), len(AMBIGUOUS))


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)
