"""OpenTelemetry spans of a rerank call, for those who ask for them and have `opentelemetry-api` installed.

The attributes are those of OpenInference (a span of kind RERANKER, `reranker.*`) and the `gen_ai.*` names of
OpenTelemetry's conventions for generative AI. Texts are left out unless they are asked for.
Source: https://arize-ai.github.io/openinference/spec/semantic_conventions.html
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from mistral_rerank.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mistral_rerank.reranker import RankedPassage

    Report = Callable[[list[RankedPassage]], list[RankedPassage]]
    Attributes = dict[str, str | int | float]

KIND = "openinference.span.kind"


def request_attributes(query: str, texts: Sequence[str], *, model: str, top_n: int | None) -> Attributes:
    """Describe what a reranker is asked, as OpenInference does."""
    attributes: Attributes = {
        "reranker.query": query,
        "reranker.model_name": model,
        "reranker.top_k": len(texts) if top_n is None else top_n,
    }
    for position, text in enumerate(texts):
        attributes[f"reranker.input_documents.{position}.document.content"] = text
    return attributes


def result_attributes(ranking: Sequence[RankedPassage]) -> Attributes:
    """Describe what it answers, as OpenInference does."""
    attributes: Attributes = {}
    for position, place in enumerate(ranking):
        document = f"reranker.output_documents.{position}.document"
        attributes[f"{document}.content"] = place.text
        attributes[f"{document}.score"] = place.score.probability
    return attributes


@contextmanager
def rerank_span(
    query: str, texts: Sequence[str], *, model: str, top_n: int | None, content: bool
) -> Iterator[Report]:
    """Make the current span one of a rerank call; errors and cancellation end it with an error status.

    Args:
        query: the question.
        texts: the passages, as the model reads them.
        model: the model's name.
        top_n: how many are wanted; None for all.
        content: whether question and passages go into the span.

    Yields:
        A function that notes the ranking, and returns it.

    Raises:
        MissingDependencyError: `opentelemetry-api` is not installed.

    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise MissingDependencyError("telemetry needs opentelemetry: pip install opentelemetry-api") from error

    tracer = trace.get_tracer("mistral_rerank")
    with tracer.start_as_current_span(f"rerank {model}", record_exception=content) as span:
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

        def report(ranking: list[RankedPassage]) -> list[RankedPassage]:
            if content:
                span.set_attributes(result_attributes(ranking))
            span.set_attribute("gen_ai.rerank.result.count", len(ranking))
            return ranking

        yield report
