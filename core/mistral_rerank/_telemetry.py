"""OpenTelemetry spans of a rerank call and of a server's request; they need `opentelemetry-api`.

The attributes are those of OpenInference (a span of kind RERANKER, `reranker.*`), the `gen_ai.*` names of
OpenTelemetry's conventions for generative AI, and those of HTTP for a request. Spans contain texts only on request.
Source: https://arize-ai.github.io/openinference/spec/semantic_conventions.html
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mistral_rerank.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from opentelemetry.trace import Tracer

    from mistral_rerank.scores import Ranking

    Report = Callable[[Ranking], Ranking]
    Answered = Callable[[str, int], None]
    Attributes = dict[str, str | int | float]

KIND = "openinference.span.kind"
KEPT_ORDER = "mistral_rerank.kept_order"


def tracer() -> Tracer:
    """Give the tracer of this package.

    Raises:
        MissingDependencyError: `opentelemetry-api` is not installed.

    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise MissingDependencyError("telemetry needs opentelemetry: pip install opentelemetry-api") from error
    return trace.get_tracer("mistral_rerank")


def request_attributes(query: str, texts: Sequence[str], *, model: str, top_n: int | None) -> Attributes:
    """Give OpenInference's attributes of a call's input."""
    attributes: Attributes = {
        "reranker.query": query,
        "reranker.model_name": model,
        "reranker.top_k": len(texts) if top_n is None else top_n,
    }
    for position, text in enumerate(texts):
        attributes[f"reranker.input_documents.{position}.document.content"] = text
    return attributes


def result_attributes(ranking: Ranking) -> Attributes:
    """Give OpenInference's attributes of a call's result; passages in the retriever's order have no scores."""
    attributes: Attributes = {}
    for position, ranked in enumerate(ranking):
        document = f"reranker.output_documents.{position}.document"
        attributes[f"{document}.content"] = ranked.text
        if ranking.error is None:
            attributes[f"{document}.score"] = ranked.score.probability
    return attributes | kept_order_attributes(ranking) | usage_attributes(ranking)


def usage_attributes(ranking: Ranking) -> Attributes:
    """Give the attributes of what a call used, as far as that is known."""
    usage = ranking.usage
    counts = {"gen_ai.usage.input_tokens": usage.tokens, "mistral_rerank.search_units": usage.search_units}
    return {name: count for name, count in counts.items() if count}


def kept_order_attributes(ranking: Ranking) -> Attributes:
    """Give the attributes of a result in the retriever's order; none for a ranking."""
    return {} if ranking.error is None else {KEPT_ORDER: True, "error.type": type(ranking.error).__name__}


@contextmanager
def rerank_span(query: str, texts: Sequence[str], *, model: str, top_n: int | None, content: bool) -> Iterator[Report]:
    """Make the current span one of a rerank call; errors and cancellation end it with an error status.

    It contains the question and the passages only with `content`. Yields a function that records and returns the
    ranking.
    """
    start = tracer().start_as_current_span
    from opentelemetry.trace import StatusCode

    with start(f"rerank {model}", record_exception=content, set_status_on_exception=content) as span:
        span.set_attributes(
            {
                KIND: "RERANKER",
                "gen_ai.operation.name": "rerank",
                "gen_ai.request.model": model,
                "gen_ai.rerank.candidate.count": len(texts),
                "reranker.model_name": model,
                "reranker.top_k": len(texts) if top_n is None else top_n,
            }
        )
        if content:
            span.set_attributes(request_attributes(query, texts, model=model, top_n=top_n))

        def report(ranking: Ranking) -> Ranking:
            span.set_attributes(result_attributes(ranking) if content else kept_order_attributes(ranking))
            span.set_attribute("gen_ai.rerank.result.count", len(ranking))
            span.set_attributes(usage_attributes(ranking))
            return ranking

        try:
            yield report
        except BaseException as error:
            if not content:  # the message of a foreign error may contain a text
                span.set_status(StatusCode.ERROR, type(error).__name__)
            raise


@contextmanager
def server_span(method: str, headers: Mapping[str, str], request_id: str) -> Iterator[Answered]:
    """Make the current span one of an HTTP request, in the client's trace if it sent a `traceparent`.

    Of the headers only the trace context is read. Yields a function that records the route and the status.
    """
    start = tracer().start_as_current_span
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind, StatusCode

    known = {"http.request.method": method, "mistral_rerank.request_id": request_id}
    context = extract(headers)
    with start(method, context, SpanKind.SERVER, known, record_exception=False) as span:

        def answered(route: str, status: int) -> None:
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.route": route, "http.response.status_code": status})
            if status >= 500:
                span.set_status(StatusCode.ERROR)

        yield answered
