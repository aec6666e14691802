"""What happens when the network or the endpoint fails, over real sockets."""

import asyncio
import random
import socket
import threading
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import pytest
from remote.endpoint import (
    Endpoint,
    drips,
    drips_its_head,
    ends_early,
    expected,
    gives,
    hangs,
    rankings,
    resets_before_answering,
    resets_in_the_body,
    speaks,
)

from mistral_rerank import RemoteError, RemoteReranker, errors
from mistral_rerank.remote import endpoint as endpoint_module
from mistral_rerank.remote import transport
from mistral_rerank.remote.retries import Retries

PASSAGES = [f"passage {number}" for number in range(5)]
AT_ONCE = Retries(most=2, first_wait=0.0)
TOO_SLOW = 0.4  # seconds of a call that can only end by its deadline

right = speaks("nvidia")
no_content_type = gives(200, {"rankings": []}, {"Content-Type": "text/html"})

HEALED = {
    "reset before the answer": resets_before_answering,
    "reset in the body": resets_in_the_body,
    "body ends early": ends_early,
    "truncated JSON": gives(200, b'{"rankings":[{"index":0,'),
    "a web page": gives(200, b"<html>one moment</html>", {"Content-Type": "text/html"}),
    "bad gzip": gives(200, b"no gzip", {"Content-Encoding": "gzip"}),
    **{f"status {status}": gives(status, {"detail": "x"}) for status in (408, 409, 425, 429, 500, 502, 503, 504)},
    "429 with seconds": gives(429, {}, {"Retry-After": "0"}),
    "429 with milliseconds": gives(429, {}, {"Retry-After-Ms": "1"}),
    "429 with a date": gives(429, {}, {"Retry-After": format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)}),
    "a missing ranking": rankings(lambda found: found[:-1]),
    "a ranking twice": rankings(lambda found: [*found[:-1], found[0]]),
    "an index out of range": rankings(lambda found: [{**found[0], "index": 5}, *found[1:]]),
    "a boolean index": rankings(lambda found: [{**found[0], "index": True}, *found[1:]]),
    "NaN": rankings(lambda found: [{**found[0], "logit": float("nan")}, *found[1:]]),
    "Infinity": rankings(lambda found: [{**found[0], "logit": float("inf")}, *found[1:]]),
    "no rankings": gives(200, {"usage": {"total_tokens": 1}}),
}

REFUSED = {
    301: "RequestRefusedError",
    400: "RequestRefusedError",
    401: "AuthenticationError",
    402: "QuotaExceededError",
    403: "AuthenticationError",
    404: "NotFoundError",
    410: "ModelRetiredError",
    413: "RequestTooLargeError",
    422: "RequestRefusedError",
    501: "ServerError",
}


def remote(endpoint, **settings):
    options = {"base_url": endpoint.url, "protocol": "nvidia", "retries": AT_ONCE, "timeout": 30.0}
    return RemoteReranker("m", **(options | settings))


def ask(reranker, passages=PASSAGES, *, how="sync"):
    if how == "sync":
        return reranker.rank("q", passages)
    return asyncio.run(reranker.arank("q", passages))


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
@pytest.mark.parametrize("fault", HEALED.values(), ids=HEALED)
def test_a_passing_fault_is_healed_by_asking_again(fault, how):
    with Endpoint(right, [fault]) as endpoint, remote(endpoint) as reranker:
        assert ask(reranker, how=how) == expected(PASSAGES)
    first, second = endpoint.requests
    assert first.body == second.body
    assert first.headers["x-request-id"] == second.headers["x-request-id"]


@both
@pytest.mark.parametrize("fault", HEALED.values(), ids=HEALED)
def test_a_lasting_fault_is_a_typed_error_after_three_attempts(fault, how):
    with Endpoint(fault) as endpoint, remote(endpoint) as reranker, pytest.raises(RemoteError) as raised:
        ask(reranker, how=how)
    assert type(raised.value) is not RemoteError
    assert len(endpoint.requests) == 3


@both
@pytest.mark.parametrize(("status", "kind"), REFUSED.items())
def test_a_refusal_is_final(status, kind, how):
    with Endpoint(gives(status, {"detail": "because"})) as endpoint, remote(endpoint) as reranker:
        with pytest.raises(getattr(errors, kind), match="because"):
            ask(reranker, ["one"], how=how)
    assert len(endpoint.requests) == 1


@both
def test_nobody_listens(how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with RemoteReranker("m", base_url=url, retries=AT_ONCE) as reranker:
        with pytest.raises(errors.EndpointUnreachableError, match="check base_url") as raised:
            ask(reranker, how=how)
    assert isinstance(raised.value, ConnectionError)


@both
def test_a_certificate_that_is_not_trusted_says_how_to_trust_it(how):
    def refuse(request):
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")

    with RemoteReranker("m", base_url="https://nim", retries=0, transport=httpx.MockTransport(refuse)) as reranker:
        with pytest.raises(errors.EndpointUnreachableError, match="set SSL_CERT_FILE") as raised:
            ask(reranker, how=how)
    assert "check base_url" not in str(raised.value)


@both
@pytest.mark.parametrize("fault", [hangs, drips, drips_its_head], ids=["no first byte", "a slow body", "a slow head"])
def test_the_deadline_ends_what_would_never_end(fault, how):
    with Endpoint(fault) as endpoint, remote(endpoint, timeout=TOO_SLOW) as reranker:
        with pytest.raises(errors.DeadlineExceededError) as raised:
            ask(reranker, how=how)
    assert isinstance(raised.value, TimeoutError)


@both
@pytest.mark.parametrize("fault", [drips, drips_its_head], ids=["a slow body", "a slow head"])
def test_the_deadline_closes_the_connection_of_an_answer_that_drips(fault, how):
    left = threading.Event()

    def until_nobody_listens(exchange):
        try:
            fault(exchange)
        except ConnectionError:
            left.set()
            raise

    with Endpoint(until_nobody_listens) as endpoint, remote(endpoint, timeout=TOO_SLOW) as reranker:
        with pytest.raises(errors.DeadlineExceededError):
            ask(reranker, how=how)
        assert left.wait(20)


@both
def test_an_endless_answer_is_given_up(how, monkeypatch):
    monkeypatch.setattr(transport, "MAX_REPLY_BYTES", 100_000)

    def never_ends(exchange):
        exchange.head(200, None, {"Content-Type": "application/json"})
        while not exchange.released.is_set():
            exchange.write(b" " * 65536)

    with Endpoint(never_ends) as endpoint, remote(endpoint) as reranker:
        with pytest.raises(errors.InvalidReplyError, match="more than 100000 bytes"):
            ask(reranker, how=how)


@both
def test_an_attempt_that_hangs_can_be_given_up_for_the_next(how):
    with Endpoint(right, [hangs]) as endpoint, remote(endpoint, read_timeout=TOO_SLOW) as reranker:
        assert ask(reranker, how=how) == expected(PASSAGES)


@both
def test_a_wait_longer_than_the_call_may_take_fails_at_once(how):
    for headers in ({"Retry-After": "3600"}, {"Retry-After": "50"}):
        with Endpoint(gives(429, {}, headers)) as endpoint, remote(endpoint) as reranker:
            with pytest.raises(errors.RateLimitError) as raised:
                ask(reranker, how=how)
        assert raised.value.retry_after in (3600.0, 50.0)
        assert len(endpoint.requests) == 1


@both
def test_unsorted_rankings_are_sorted(how):
    backwards = rankings(lambda found: found[::-1])
    with Endpoint(backwards) as endpoint, remote(endpoint) as reranker:
        assert ask(reranker, how=how) == expected(PASSAGES)


def hosted(*statuses, **settings):
    """A reranker at NVIDIA's hosted API, which answers with these statuses, the last one again and again."""
    requests, left = [], list(statuses)

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        status = left.pop(0) if len(left) > 1 else left[0]
        body = {"rankings": [{"index": 0, "logit": 1.5}]} if status == 200 else None
        return httpx.Response(status, json=body, headers={"NVCF-REQID": "abc-1"})

    network = httpx.MockTransport(answer)
    return requests, RemoteReranker(protocol="nvidia", transport=network, **settings)


@both
def test_a_result_that_is_not_ready_is_polled_until_it_is(how, monkeypatch):
    monkeypatch.setattr(endpoint_module, "POLL_SECONDS", 0.001)
    requests, reranker = hosted(202, 202, 200, api_key="k")
    with reranker:
        assert [ranked.score.logit for ranked in ask(reranker, ["one"], how=how)] == [1.5]
    status = "https://api.nvcf.nvidia.com/v2/nvcf/pexec/status/abc-1"
    assert [str(request.url) for request in requests[1:]] == [status, status]
    assert {request.headers["authorization"] for request in requests} == {"Bearer k"}


@both
def test_a_result_that_never_comes_ends_with_the_deadline(how):
    _, reranker = hosted(202, timeout=TOO_SLOW)
    with reranker, pytest.raises(errors.DeadlineExceededError):
        ask(reranker, how=how)


def test_no_other_endpoint_is_polled():
    with Endpoint(gives(202, b"", {"NVCF-REQID": "abc"})) as endpoint, remote(endpoint) as reranker:
        with pytest.raises(errors.InvalidReplyError, match="only at NVIDIA's hosted API"):
            ask(reranker)
    assert {request.path for request in endpoint.requests} == {"/v1/ranking"}


@both
def test_one_failed_batch_fails_the_call(how):
    passages = [f"passage {number}" for number in range(64)]
    with Endpoint(right, [right, gives(400, {"detail": "no"})]) as endpoint, remote(endpoint) as reranker:
        with pytest.raises(errors.RequestRefusedError):
            ask(reranker, passages, how=how)


@both
def test_a_batch_that_is_too_large_is_halved_until_it_fits(how):
    passages = [f"passage {number}" for number in range(100)]
    with Endpoint(speaks("nvidia", most=7)) as endpoint, remote(endpoint) as reranker:
        assert ask(reranker, passages, how=how) == expected(passages)


def test_2000_random_sequences_of_faults_lose_and_misplace_nothing():
    """Each call meets random faults; its answer is right or an error of its own kind, never something between."""
    draw = random.Random(4)
    faults = list(HEALED.values())
    known = {passage: place.score for passage, place in _scores()}
    outcomes = {"right": 0, "error": 0}
    lock, waiting = threading.Lock(), iter(range(2000))
    with Endpoint(right) as endpoint:
        rerankers = [remote(endpoint, max_passages=4, max_concurrency=3) for _ in range(4)]

        def work(reranker: RemoteReranker) -> None:
            for number in waiting:
                with lock:
                    endpoint.script += [
                        draw.choice([right, *draw.sample(faults, 2)]) for _ in range(draw.randint(0, 4))
                    ]
                    passages = draw.choices(list(known), k=draw.randint(1, 12))
                query = f"question {number}"
                try:
                    scores = reranker.score_pairs([(query, passage) for passage in passages])
                except (errors.EndpointUnreachableError, errors.InvalidReplyError, errors.ServerError):
                    outcome = "error"
                except (errors.RateLimitError, errors.RequestRefusedError):
                    outcome = "error"
                else:
                    outcome = "right"
                    assert scores == [known[passage] for passage in passages]
                with lock:
                    outcomes[outcome] += 1

        threads = [_Checked(work, reranker) for reranker in rerankers]
        for thread in threads:
            thread.join()
        for reranker in rerankers:
            reranker.close()
    assert sum(outcomes.values()) == 2000
    assert min(outcomes.values()) > 50


def _scores():
    passages = [f"passage {number}" for number in range(40)]
    return [(place.text, place) for place in expected(passages)]


class _Checked(threading.Thread):
    """A thread whose error is the test's."""

    def __init__(self, target, *args):
        super().__init__(daemon=True)
        self._work, self._arguments, self._error = target, args, None
        self.start()

    def run(self):
        try:
            self._work(*self._arguments)
        except BaseException as error:
            self._error = error

    def join(self, timeout=None):
        super().join(timeout)
        if self._error is not None:
            raise self._error
