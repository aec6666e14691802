import json
from datetime import UTC, datetime

import pytest
from server.running import running
from support import LengthReranker

from mistral_rerank import InputTooLongError, RemoteReranker, errors
from mistral_rerank.remote.error_mapping import is_retryable, retry_after, to_error
from mistral_rerank.remote.retries import RateLimit, Retries
from mistral_rerank.remote.transport import Response

INVALID_TOKEN = 'Bearer error="invalid_token", error_description="expired"'


def of(status, body=b"", headers=None):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return to_error(Response(status, headers or {}, content), url="http://h/v1", request_id="ours", hide=str)


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (
            400,
            {"error": "Input length 1024 exceeds maximum allowed token size 512"},
            "RemoteInputTooLongError",
            "512",
        ),
        (
            422,
            {"object": "error", "message": "Input length 12007 exceeds maximum allowed token size 8192"},
            "RemoteInputTooLongError",
            "8192",
        ),
        (
            400,
            {"error": {"message": "This model's maximum context length is 512 tokens.", "code": 400}},
            "RemoteInputTooLongError",
            "maximum context length",
        ),
        (400, {"error": "top_k: unknown field, expected one of model, query"}, "RequestRefusedError", "top_k"),
        (400, {"message": "invalid request: list of documents must not be empty"}, "RequestRefusedError", "empty"),
        (401, b"", "AuthenticationError", "api_key"),
        (401, {"timestamp": 1, "status": 401, "error": "Unauthorized"}, "AuthenticationError", "Unauthorized"),
        (402, b"", "QuotaExceededError", "credits"),
        (
            403,
            {"status": 403, "title": "Forbidden", "detail": "Authorization failed"},
            "AuthenticationError",
            "failed",
        ),
        (404, b"404 page not found\n", "NotFoundError", "page not found"),
        (404, {"detail": "Unknown. Available models are: ['a', 'b']"}, "NotFoundError", "['a', 'b']"),
        (
            404,
            {"status": 404, "title": "Not Found", "detail": "Function 'x': Not found for account"},
            "NotFoundError",
            "Function",
        ),
        (
            410,
            {"title": "Gone", "detail": "reached its end of life on 2026-05-18"},
            "ModelRetiredError",
            "2026-05-18",
        ),
        (413, b"length limit exceeded", "RequestTooLargeError", "max_passages"),
        (
            422,
            {"error": "batch size 40 > maximum allowed batch size 32", "error_type": "Validation"},
            "RequestTooLargeError",
            "32",
        ),
        (
            422,
            {"detail": [{"loc": ["body", "query"], "msg": "Field required", "input": "a secret"}]},
            "RequestRefusedError",
            "body.query: Field required",
        ),
        (
            422,
            {"detail": [{"loc": ["passages"], "msg": "List should have at most 512 items", "input": "a secret"}]},
            "RequestTooLargeError",
            "at most 512",
        ),
        (429, {"status": 429, "title": "Too Many Requests"}, "RateLimitError", "Too Many Requests"),
        (429, {"error": "Model is overloaded", "error_type": "Overloaded"}, "RateLimitError", "overloaded"),
        (500, b"<html>oops</html>", "ServerError", "answered 500"),
        (501, b"", "ServerError", "501"),
        (502, {"detail": "Backend returned 404 for x"}, "NotFoundError", "answered 404"),
        (503, {"error": {"message": "queue full", "type": "x"}}, "ServerError", "queue full"),
    ],
)
def test_every_known_error_body_gives_its_kind_and_says_what_the_endpoint_said(status, body, kind, said):
    error = of(status, body)
    assert type(error).__name__ == kind
    assert said in str(error)
    assert "secret" not in str(error)
    assert str(error).startswith("http://h/v1 answered ")


def test_status_request_id_and_wait_are_kept():
    error = of(429, {"requestId": "theirs"}, {"retry-after": "7"})
    assert (error.status, error.request_id, error.retry_after) == (429, "theirs", 7.0)
    assert of(500, {}, {"nvcf-reqid": "nv"}).request_id == "nv"
    assert of(500).request_id == "ours"


def test_a_header_explains_a_refusal_without_a_body():
    assert "expired" in str(of(401, b"", {"www-authenticate": INVALID_TOKEN}))


def test_a_redirect_is_not_followed_and_says_where_to():
    assert "https://other/x;" in str(of(308, b"", {"location": "https://other/x?token=1"})).replace(" ", "")


def test_a_too_long_input_is_caught_as_locally():
    assert isinstance(of(422, {"message": "Input length 9 exceeds maximum allowed token size 8"}), InputTooLongError)


def test_a_long_message_is_cut():
    assert len(str(of(500, {"detail": "x" * 10_000}))) < 400


@pytest.mark.parametrize(
    ("status", "again"),
    [(s, True) for s in (408, 409, 425, 429, 500, 502, 503, 504)]
    + [(s, False) for s in (301, 400, 401, 402, 403, 404, 410, 413, 422, 501, 505)],
)
def test_which_answers_are_worth_another_attempt(status, again):
    assert is_retryable(of(status)) is again


def test_connection_errors_and_broken_replies_are_worth_another_attempt():
    assert is_retryable(errors.EndpointUnreachableError("x"))
    assert is_retryable(errors.InvalidReplyError("x", status=200))
    assert not is_retryable(errors.RemoteDeadlineExceededError("x"))


NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_every_form_of_retry_after(headers, seconds):
    assert retry_after(headers, NOON) == seconds


def test_waits_double_up_to_a_cap_and_obey_the_endpoint_up_to_another():
    retries = Retries(most=6, first_wait=1.0, longest_wait=4.0, longest_retry_after=10.0)
    for attempt, full in enumerate((1.0, 2.0, 4.0, 4.0)):
        assert 0.75 * full <= retries.wait(attempt, None) <= full
    assert retries.wait(0, 10.0) == 10.0
    assert retries.wait(0, 10.1) is None
    assert retries.wait(6, None) is None


def test_our_own_servers_limit_of_passages_is_understood():
    with running(LengthReranker(), max_passages=10) as url, RemoteReranker(base_url=url, protocol="jina") as reranker:
        assert len(reranker.rank("q", [f"passage {n}" for n in range(64)])) == 64


def test_a_rate_limit_gives_each_request_a_moment_of_its_own():
    rate = RateLimit(30)
    assert [rate.reserve(100.0, before=110.0) for _ in range(3)] == [0.0, 2.0, 4.0]
    assert rate.reserve(200.0, before=210.0) == 0.0
    assert [RateLimit(None).reserve(1.0, before=2.0) for _ in range(3)] == [0.0, 0.0, 0.0]


def test_a_call_that_the_rate_limit_turns_away_takes_no_moment():
    rate = RateLimit(2)
    assert [rate.reserve(100.0 + 10 * n, before=120.0 + 10 * n) for n in range(7)] == [
        *(0.0, None, 10.0, None, None, 10.0, None),
    ]
