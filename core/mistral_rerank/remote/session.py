"""One batch of passages against an endpoint, from texts to scores, without any I/O.

`Endpoint.score` is a generator: it yields a `Request` to be sent or a `Sleep` to be kept, and takes the answer, or
the error in its place. Everything that is decided lies here, so threads and event loops share it: probing for
the protocol, retries, polling, and halving a batch that is refused as too large.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from mistral_rerank.errors import (
    DeadlineExceededError,
    InvalidInputError,
    InvalidReplyError,
    NotFoundError,
    RemoteError,
    RemoteInputTooLongError,
    RequestTooLargeError,
)
from mistral_rerank.protocols import RerankRequest, WireProtocol
from mistral_rerank.protocols.replies import from_probability, is_probability, read_scores
from mistral_rerank.protocols.urls import HOSTED_NVIDIA, same_owner, shown_url, sibling_url
from mistral_rerank.remote.error_mapping import (
    failure,
    is_error_body,
    is_retryable,
    most_passages,
    says_unknown_model,
)
from mistral_rerank.remote.redaction import redact
from mistral_rerank.remote.transport import Request, Response

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mistral_rerank.protocols import Unit
    from mistral_rerank.remote.rate_limit import RateLimit, Retries
    from mistral_rerank.reranker import Score

T = TypeVar("T")

logger = logging.getLogger(__name__)

WRONG_ROUTE = frozenset({200, 400, 401, 403, 404, 405, 422})
"""Statuses after which the next protocol is tried: those of NVIDIA's own client, those of gateways that answer 401 or
403 for unknown paths, and 200 with an error in its body, which is what LM Studio gives for an unknown path."""

DOUBTFUL = ((400, 422), (401, 403), (200,))
"""Statuses of refusals, from those of a route that exists to those that any path may have; 404 and 405 come last."""

SEVERAL = 3
"""So many scores in [0, 1], where logits were asked for, are taken to be probabilities."""

CLOCK_SLACK = 0.005
"""A timeout that ends this many seconds early is the deadline's."""

STATUS_URL = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status"


@dataclass(frozen=True, slots=True)
class Sleep:
    """So many seconds are to pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Passages of one question, and whether a pair over the model's limit is cut or refused."""

    query: str
    passages: Sequence[str]
    truncate: bool


Session = Generator[Request | Sleep, Response | None, T]


class Endpoint:
    """What is known of an endpoint, and how to talk to it.

    Args:
        candidates: protocols with their URLs, in the order to try; one when the protocol is known.
        model: its name; None for whichever is served.
        headers: of every request, to whichever host.
        private_headers: of requests to the endpoint's own host, the key among them; their values are secrets.
        unit: what its scores are; None for what the protocol says.
        retries: how often to try again.
        rate: the limit of requests a minute.
        read_timeout: seconds to wait for each part of an answer; None for all that the call has left.
        status_url: where to ask for a result that is not ready (202); None for NVIDIA's, at NVIDIA's host alone.
        poll_wait: seconds between such questions.

    """

    def __init__(
        self,
        candidates: tuple[tuple[WireProtocol, str], ...],
        *,
        model: str | None,
        headers: Mapping[str, str],
        private_headers: Mapping[str, str],
        unit: Unit | None,
        retries: Retries,
        rate: RateLimit,
        read_timeout: float | None,
        status_url: str | None,
        poll_wait: float,
    ) -> None:
        self._candidates = candidates
        self._model = model
        self._headers, self._private_headers = headers, private_headers
        self._unit = unit
        self._retries = retries
        self._rate = rate
        self._read_timeout = read_timeout
        self._status_url = status_url
        self._poll_wait = poll_wait
        self._secrets = [value.removeprefix("Bearer ") for value in private_headers.values()]
        self._knows_model = model is not None
        self._most_passages: int | None = None  # as learnt from refusals
        self._most_bytes: int | None = None
        self._calibrated = self._named = True  # until a reply is otherwise
        self._found_unit: Unit | None = None

    @property
    def protocol(self) -> WireProtocol:
        """The protocol in use, or the first to be tried."""
        return self._candidates[0][0]

    @property
    def most_passages(self) -> int | None:
        """How many passages the endpoint takes at once, where it has refused more."""
        return self._most_passages

    @property
    def most_bytes(self) -> int:
        """How long a request may be."""
        return min(self.protocol.max_bytes, self._most_bytes or self.protocol.max_bytes)

    @property
    def is_settled(self) -> bool:
        """Whether it is known which protocol is spoken, and which model is served where that has to be asked."""
        return len(self._candidates) == 1 and not self._has_to_ask_for_model(*self._candidates[0])

    def score(self, batch: Batch, deadline: float) -> Session[list[Score]]:
        """Score one batch.

        Args:
            batch: at most as many passages as the protocol takes.
            deadline: on `time.monotonic`'s clock.

        Returns:
            A score for each passage, in order.

        Raises:
            RemoteError: one of its kinds, when no usable answer came in time.

        """
        size = len(batch.passages)
        if self._most_passages is None or size <= self._most_passages:
            try:
                return (yield from self._first_that_answers(batch, deadline))
            except RequestTooLargeError as error:
                if size == 1:
                    raise
                self._learn_limit(error, batch)
        step = min(self._most_passages or size, -(-size // 2))
        scores: list[Score] = []
        for start in range(0, size, step):
            scores += yield from self.score(replace(batch, passages=batch.passages[start : start + step]), deadline)
        return scores

    def settled_scores(self, scores: list[Score]) -> list[Score]:
        """Decide what all the scores of a call are, where its replies left that open, and warn once of doubts.

        Raw logits that all lie in [0, 1] are rare; an endpoint that ignores the request for logits gives
        probabilities, which must not go through a sigmoid again.
        """
        if self._calibrated or not scores:
            return scores
        host = urlsplit(self._candidates[0][1]).netloc
        if not self._named and self._unit is None and self._found_unit != "logit":
            if not all(is_probability(score.logit) for score in scores):
                self._found_unit = "logit"
            elif self._found_unit == "probability" or len(scores) >= SEVERAL:
                self._found_unit = "probability"
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

    def _learn_limit(self, error: RequestTooLargeError, batch: Batch) -> None:
        """Remember what a refusal says of the endpoint's limits, for this call and later ones."""
        most = most_passages(error, len(batch.passages))
        if most is not None:
            self._most_passages = min(most, self._most_passages or most)
        else:
            content = len(batch.query.encode()) + sum(len(passage.encode()) for passage in batch.passages)
            self._most_bytes = min(content // 2, self._most_bytes or content)

    def _first_that_answers(self, batch: Batch, deadline: float) -> Session[list[Score]]:
        candidates, refusals = self._candidates, []
        for protocol, url in candidates:
            try:
                scores = yield from self._ask(protocol, url, batch, deadline)
            except (RemoteInputTooLongError, RequestTooLargeError):
                self._candidates = ((protocol, url),)  # it understood the request
                raise
            except RemoteError as error:
                if len(candidates) == 1 or error.status not in WRONG_ROUTE or isinstance(error, InvalidReplyError):
                    raise
                if self._model is not None and says_unknown_model(error, url):
                    raise  # other routes may not read the model's name, and would answer with another model
                refusals.append(error)
            else:
                self._candidates = ((protocol, url),)
                self._knows_model = True  # or does without
                return scores
        best = min(refusals, key=_doubt)
        if _doubt(best) < len(DOUBTFUL):
            raise best
        tried = ", ".join(shown_url(url) for _, url in candidates)
        raise NotFoundError(
            f"no rerank API here, or not this model; tried {tried}; the first said: {refusals[0]}",
            status=refusals[0].status,
            request_id=refusals[0].request_id,
        )

    def _ask(self, protocol: WireProtocol, url: str, batch: Batch, deadline: float) -> Session[list[Score]]:
        """Send one request, again where that may help."""
        headers = {**self._headers, **self._private_headers, "X-Request-Id": uuid.uuid4().hex}
        if self._has_to_ask_for_model(protocol, url):
            yield from self._find_model(url, headers, deadline)
        unit = self._unit or protocol.unit
        request = RerankRequest(
            batch.query, tuple(batch.passages), model=self._model, truncate=batch.truncate, unit=unit
        )
        content = _encoded(protocol.write_request(request))
        attempt = 0
        while True:
            try:
                response = yield from self._send("POST", url, headers, content, deadline)
                response = yield from self._finished(response, url, headers, deadline)
                if response.status == 200:
                    try:
                        return self._read(response, url, headers, count=len(batch.passages), unit=unit)
                    except InvalidReplyError:
                        if not is_error_body(response.content):
                            raise
                hide = partial(redact, secrets=self._secrets, texts=(batch.query, *batch.passages))
                raise failure(response, url=url, request_id=headers["X-Request-Id"], hide=hide)
            except RemoteError as error:
                wait = self._retries.wait(attempt, error.retry_after) if is_retryable(error) else None
                if isinstance(error, DeadlineExceededError):
                    raise
                if time.monotonic() >= deadline - CLOCK_SLACK:
                    raise DeadlineExceededError(
                        f"the time of the call is over; last: {error}",
                        status=error.status,
                        request_id=error.request_id,
                    ) from error
                if wait is None or time.monotonic() + wait >= deadline:
                    raise
            yield Sleep(wait)
            attempt += 1

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None, deadline: float
    ) -> Session[Response]:
        wait = self._rate.reserve(time.monotonic(), before=deadline)
        if wait is None:
            raise DeadlineExceededError(
                "the limit of requests_per_minute leaves no time for this call; raise it, or timeout"
            )
        if wait:
            yield Sleep(wait)
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError(
                f"the time of the call is over before {shown_url(url)} was asked; raise timeout"
            )
        timeout = left if self._read_timeout is None else min(left, self._read_timeout)
        response = yield Request(method, url, headers, content, timeout, deadline)
        assert response is not None  # noqa: S101 - a Call is answered by an Answer
        return response

    def _finished(self, response: Response, url: str, headers: Mapping[str, str], deadline: float) -> Session[Response]:
        """Ask for the result of a request that NVIDIA's gateway took (202), until it is there."""
        while response.status == 202:
            identity = response.headers.get("nvcf-reqid", "")
            status_url = self._status_url or (STATUS_URL if urlsplit(url).hostname == HOSTED_NVIDIA else None)
            if status_url is None or not identity.replace("-", "").isalnum():
                raise InvalidReplyError(
                    f"{shown_url(url)} answered 202 and does not say where the result will be; give status_url",
                    status=None,
                )
            yield Sleep(min(self._poll_wait, max(0.0, deadline - time.monotonic())))
            if not same_owner(url, status_url):
                headers = {name: value for name, value in headers.items() if name not in self._private_headers}
            response = yield from self._send("GET", f"{status_url}/{identity}", headers, None, deadline)
        return response

    def _read(self, response: Response, url: str, headers: Mapping[str, str], *, count: int, unit: Unit) -> list[Score]:
        try:
            reading = read_scores(response.content, count=count, unit=unit)
        except InvalidReplyError as error:
            named = response.headers.get("x-request-id", headers["X-Request-Id"])
            raise InvalidReplyError(
                f"{shown_url(url)} answered 200 with {error}", status=200, request_id=named
            ) from None
        self._calibrated &= reading.calibrated
        self._named &= reading.named
        return reading.scores

    def _has_to_ask_for_model(self, protocol: WireProtocol, url: str) -> bool:
        return not self._knows_model and protocol.name == "nvidia" and urlsplit(url).hostname != HOSTED_NVIDIA

    def _find_model(self, url: str, headers: Mapping[str, str], deadline: float) -> Session[None]:
        """Ask which model is served; an endpoint that does not say may know without its name."""
        try:
            response = yield from self._send("GET", sibling_url(url, "models"), headers, None, deadline)
            listed = json.loads(response.content)["data"] if response.status == 200 else []
            self._model = next((entry["id"] for entry in listed if isinstance(entry["id"], str)), None)
            self._knows_model = self._model is not None
        except DeadlineExceededError:
            raise
        except (RemoteError, ValueError, LookupError, TypeError, RecursionError):
            return


def _doubt(error: RemoteError) -> int:
    """Order refusals by how little they say of the route: the first is what a user should read."""
    return next((place for place, statuses in enumerate(DOUBTFUL) if error.status in statuses), len(DOUBTFUL))


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _encoded(body: object) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise InvalidInputError("a text holds half of a surrogate pair, which is no Unicode character") from None
