"""The server's OpenTelemetry spans: one of a request, one of its ranking, no text in either."""

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server.running import running
from support import FailingReranker, LengthReranker

BODY = {"query": "secret", "documents": ["secret a", "secret bbb"], "top_n": 1}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    return exporter


def spans_of(exporter: InMemorySpanExporter):
    """Those of rerank requests, by their kind."""
    spans = exporter.get_finished_spans()
    assert "secret" not in "".join(span.to_json() for span in spans)
    return {span.kind: span for span in spans}


def test_a_request_and_its_ranking_have_a_span_in_the_clients_trace(exporter: InMemorySpanExporter):
    sent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Request-Id": "abc-1"}
    with running(LengthReranker(), telemetry=True) as url:
        assert httpx.post(url + "/v1/rerank", json=BODY, headers=sent).status_code == 200
    spans = spans_of(exporter)
    request, ranking = spans[SpanKind.SERVER], spans[SpanKind.INTERNAL]
    assert request.name == "POST /v1/rerank"
    assert f"{request.context.trace_id:x}" == "af7651916cd43dd8448eb211c80319c"
    assert f"{request.parent.span_id:x}" == "b7ad6b7169203331"
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/rerank",
        "http.response.status_code": 200,
        "mistral_rerank.request_id": "abc-1",
    }
    assert ranking.parent.span_id == request.context.span_id
    assert ranking.attributes["gen_ai.rerank.candidate.count"] == 2
    assert ranking.attributes["gen_ai.rerank.result.count"] == 1


def test_a_failure_is_one_of_both_spans(exporter: InMemorySpanExporter):
    with running(FailingReranker(RuntimeError("secret")), telemetry=True) as url:
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 500
    spans = spans_of(exporter)
    assert [span.status.status_code for span in spans.values()] == [StatusCode.ERROR] * 2
    assert spans[SpanKind.INTERNAL].status.description == "RuntimeError"


def test_a_refusal_is_the_clients_error_and_no_failure(exporter: InMemorySpanExporter):
    with running(LengthReranker(), telemetry=True) as url:
        assert httpx.post(url + "/v1/rerank", json={"query": "secret"}).status_code == 422
    (request,) = exporter.get_finished_spans()
    assert request.attributes["http.response.status_code"] == 422
    assert request.status.status_code is StatusCode.UNSET


def test_without_the_setting_there_are_no_spans(exporter: InMemorySpanExporter):
    with running(LengthReranker()) as url:
        httpx.post(url + "/v1/rerank", json=BODY)
    assert exporter.get_finished_spans() == ()
