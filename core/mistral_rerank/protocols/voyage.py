"""Voyage's contract.

Source: https://docs.voyageai.com/reference/reranker-api
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from typing_extensions import override

from mistral_rerank.protocols.contract import Body, Contract, RerankReply, RerankRequest, score_of


class VoyageBody(Body):
    """The body of a request."""

    query: str
    documents: list[str] = Field(min_length=1, max_length=1000)
    model: str | None = None
    top_k: int | None = Field(default=None, ge=1)
    return_documents: bool = False
    truncation: bool = True

    @override
    def to_request(self) -> RerankRequest:
        return RerankRequest(
            self.query,
            tuple(self.documents),
            model=self.model,
            truncate=self.truncation,
            top_n=self.top_k,
            unit="probability",
            return_texts=self.return_documents,
        )


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Ask for all passages."""
    model = {} if request.model is None else {"model": request.model}
    return model | {
        "query": request.query,
        "documents": list(request.passages),
        "truncation": request.truncate,
    }


def write_reply(request: RerankRequest, reply: RerankReply) -> dict[str, Any]:
    """Give probabilities, best first."""
    return {
        "object": "list",
        "data": [
            {"index": place.index, "relevance_score": score_of(place, request.unit)}
            | ({"document": place.text} if request.return_texts else {})
            for place in reply.ranking
        ],
        "model": reply.model,
        "usage": {"total_tokens": reply.tokens},
    }


VOYAGE = Contract(
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
