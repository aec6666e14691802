"""Voyage's protocol.

Source: https://docs.voyageai.com/reference/reranker-api
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict, override

from mistral_rerank.protocols.protocol import (
    Body,
    Flag,
    ModelName,
    Positive,
    Probability,
    Query,
    RankedEntry,
    RerankReply,
    RerankRequest,
    Tokens,
    WireProtocol,
    add_extensions,
    exact,
)


class VoyageBody(Body):
    """The body of a request."""

    query: Query
    documents: list[str] = Field(min_length=1, max_length=1000, fail_fast=True)
    model: ModelName | None = None
    top_k: Positive | None = None
    return_documents: Flag | None = False
    truncation: Flag | None = True

    @override
    def to_request(self) -> RerankRequest:
        return RerankRequest(
            self.query,
            tuple(self.documents),
            model=self.model,
            truncate=self.truncation is not False,
            top_n=self.top_k,
            unit="probability",
            return_texts=bool(self.return_documents),
        )


@exact
class VoyageResult(RankedEntry):
    """The index and the score of one passage."""

    relevance_score: Probability
    document: NotRequired[str]


@exact
class VoyageUsage(TypedDict):
    """Number of tokens that the model has read."""

    total_tokens: Tokens


@exact
class VoyageReply(TypedDict):
    """The body of a reply."""

    object: Literal["list"]
    data: list[VoyageResult]
    model: str
    usage: VoyageUsage


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Request all passages, whatever the server's default."""
    model = {} if request.model is None else {"model": request.model}
    return model | {
        "query": request.query,
        "documents": list(request.passages),
        "top_k": request.top_n or len(request.passages),
        "truncation": request.truncate,
    }


def write_reply(request: RerankRequest, reply: RerankReply) -> VoyageReply:
    """Give probabilities, best first."""
    data: list[VoyageResult] = []
    for ranked in reply.ranking:
        result: VoyageResult = {
            "index": ranked.index,
            "logit": ranked.score.logit,
            "probability": ranked.score.probability,
            "relevance_score": ranked.score.probability,
        }
        add_extensions(result, ranked)
        if request.return_texts:
            result["document"] = ranked.text
        data.append(result)
    return {"object": "list", "data": data, "model": reply.model, "usage": {"total_tokens": reply.tokens}}


VOYAGE = WireProtocol(
    name="voyage",
    path="/v1/rerank",
    unit="probability",
    max_passages=1000,
    body=VoyageBody,
    write_request=write_request,
    write_reply=write_reply,
    hosted="https://api.voyageai.com",
    key_variables=("VOYAGE_API_KEY",),
)
