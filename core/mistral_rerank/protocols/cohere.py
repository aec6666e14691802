"""Cohere's protocol, versions 1 and 2, and Jina's, which is Cohere's version 1 with `usage`.

Sources: https://docs.cohere.com/reference/rerank, https://docs.cohere.com/v1/reference/rerank,
https://api.jina.ai/redoc
"""

from __future__ import annotations

from typing import Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict, override

from mistral_rerank.protocols.protocol import (
    Body,
    Flag,
    Message,
    ModelName,
    Positive,
    Query,
    RankedEntry,
    RerankReply,
    RerankRequest,
    Usage,
    WireProtocol,
    add_extensions,
    exact,
    score_of,
)
from mistral_rerank.reranker import PassageLimits


class Document(Message):
    """A passage in the object form of version 1."""

    text: str


class CohereBody(Body):
    """The body of a request, for both versions."""

    query: Query
    documents: list[str | Document] = Field(min_length=1, max_length=10_000, fail_fast=True)
    model: ModelName | None = None
    top_n: Positive | None = None
    return_documents: Flag | None = False
    max_tokens_per_doc: Positive | None = Field(default=None, description="of version 2: longer passages are cut")
    max_chunks_per_doc: Positive | None = Field(
        default=None, description="of version 1: longer passages are scored in at most so many chunks"
    )

    @override
    def to_request(self) -> RerankRequest:
        return RerankRequest(
            self.query,
            tuple(document if isinstance(document, str) else document.text for document in self.documents),
            model=self.model,
            top_n=self.top_n,
            unit="probability",
            return_texts=bool(self.return_documents),
            limits=PassageLimits(self.max_tokens_per_doc, self.max_chunks_per_doc)
            if self.max_tokens_per_doc or self.max_chunks_per_doc
            else None,
        )


@exact
class DocumentText(TypedDict):
    """A passage in a reply."""

    text: str


@exact
class CohereResult(RankedEntry):
    """The index and the score of one passage."""

    relevance_score: float
    document: NotRequired[DocumentText]


@exact
class CohereReply(TypedDict):
    """The body of a reply; `meta` is Cohere's, `usage` Jina's."""

    id: str
    model: str
    results: list[CohereResult]
    meta: dict[str, dict[str, str | int]]
    usage: Usage


def write_request_v2(request: RerankRequest) -> dict[str, Any]:
    """Request all passages, whatever the server's default; the API truncates long ones."""
    model = {} if request.model is None else {"model": request.model}
    top_n, limits = request.top_n or len(request.passages), request.limits or PassageLimits()
    stated = {"max_tokens_per_doc": limits.tokens, "max_chunks_per_doc": limits.chunks}
    return (
        model
        | {"query": request.query, "documents": list(request.passages), "top_n": top_n}
        | {name: limit for name, limit in stated.items() if limit is not None}
    )


def write_request_v1(request: RerankRequest) -> dict[str, Any]:
    """Request a reply without the passages from version 1 and Jina."""
    return write_request_v2(request) | {"return_documents": request.return_texts}


def write_reply(request: RerankRequest, reply: RerankReply) -> CohereReply:
    """Give probabilities, best first."""
    results: list[CohereResult] = []
    for ranked in reply.ranking:
        result: CohereResult = {
            "index": ranked.index,
            "logit": ranked.score.logit,
            "probability": ranked.score.probability,
            "relevance_score": score_of(ranked.score, request.unit),
        }
        add_extensions(result, ranked)
        if request.return_texts:
            result["document"] = {"text": ranked.text}
        results.append(result)
    return {
        "id": reply.id,
        "model": reply.model,
        "results": results,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        "usage": {"prompt_tokens": reply.tokens, "total_tokens": reply.tokens},
    }


COHERE = WireProtocol(
    name="cohere",
    path="/v2/rerank",
    unit="probability",
    max_passages=1000,
    body=CohereBody,
    write_request=write_request_v2,
    write_reply=write_reply,
    takes_limits=True,
    hosted="https://api.cohere.com",
    key_variables=("CO_API_KEY", "COHERE_API_KEY"),
)
JINA = WireProtocol(
    name="jina",
    path="/v1/rerank",
    unit="probability",
    max_passages=1000,
    body=CohereBody,
    write_request=write_request_v1,
    write_reply=write_reply,
    hosted="https://api.jina.ai",
    key_variables=("JINA_API_KEY",),
)
