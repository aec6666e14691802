"""The line of each request in the log, as text and as JSON."""

import json
import logging

import httpx
import pytest
from server.running import commanded, running
from support import LengthReranker

from mistral_rerank import LocalReranker
from mistral_rerank.server.request_log import JsonFormatter, RequestRecord, TextFormatter, log_request

BODY = {"query": "q", "documents": ["a", "bbb"]}


@pytest.fixture
def lines(caplog):
    """The fields of the lines of requests so far."""
    caplog.set_level(logging.INFO, "mistral_rerank.server.request_log")
    return lambda: [record.fields for record in caplog.records if hasattr(record, "fields")]


def test_a_request_is_one_line_with_its_id_key_protocol_and_times(tiny, tmp_path, lines):
    file = tmp_path / "keys"
    file.write_text("team-a: secret\n")
    headers = {"Authorization": "Bearer secret", "X-Request-Id": "abc-1"}
    with LocalReranker(str(tiny), device="cpu", share_batches=True) as reranker:
        with running(reranker, api_key_file=file) as url:
            reply = httpx.post(url + "/v1/rerank", json=BODY, headers=headers)
            for path in ("/health", "/v1/health/live", "/v1/health/ready", "/metrics"):
                httpx.get(url + path)
    (fields,) = lines()
    times = [fields.pop(name) for name in ("queue_ms", "compute_ms", "total_ms")]
    assert fields == {
        "id": "abc-1",
        "method": "POST",
        "route": "/v1/rerank",
        "status": 200,
        "key": "team-a",
        "protocol": "cohere",
        "passages": 2,
        "tokens": reply.json()["usage"]["total_tokens"],
    }
    assert min(times) >= 0
    assert times[0] + times[1] <= times[2] + 0.2


def test_a_refusal_is_a_line_too_without_what_was_sent(lines, caplog):
    with running(LengthReranker(), api_keys="k") as url:
        httpx.post(url + "/v1/ranking/secret", json=BODY, headers={"Authorization": "Bearer secret"})
    (fields,) = lines()
    assert (fields["route"], fields["status"]) == ("/v1/ranking/{model:path}", 401)
    assert "secret" not in caplog.text


def test_the_lines_are_text_or_json(caplog):
    caplog.set_level(logging.INFO, "mistral_rerank.server.request_log")
    log_request(RequestRecord("abc", "GET", "/", 200, total_ms=1.25))
    (record,) = caplog.records
    assert TextFormatter("%(message)s").format(record) == (
        "request id=abc method=GET route=/ status=200 passages=0 tokens=0 total_ms=1.2"
    )
    line = json.loads(JsonFormatter().format(record))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "mistral_rerank.server.request_log",
        "message": "request",
        "id": "abc",
        "method": "GET",
        "route": "/",
        "status": 200,
        "passages": 0,
        "tokens": 0,
        "total_ms": 1.2,
    }


def test_control_characters_cannot_forge_a_line():
    record = logging.LogRecord("x", logging.INFO, "", 0, "asked for %s", ("a\x1b[2K\rb",), None)
    assert TextFormatter("%(message)s").format(record) == "asked for a\\x1b[2K\\rb"


def test_the_command_logs_json(tiny):
    with commanded("--model", str(tiny), "--log-format", "json") as server:
        httpx.post(server.url + "/v1/rerank", json=BODY)
        server.terminate()
        lines = [json.loads(line) for line in server.stderr]
    assert [line["route"] for line in lines if line["message"] == "request"] == ["/v1/rerank"]
