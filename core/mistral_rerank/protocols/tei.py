"""The protocol of Hugging Face's text-embeddings-inference: `POST /rerank`, with a bare list as the reply.

Source: text-embeddings-inference's `router/src/http/types.rs`.
"""

from __future__ import annotations

from typing import Any, NotRequired

from pydantic import Field
from typing_extensions import override

from mistral_rerank.protocols.protocol import (
    Body,
    Flag,
    Query,
    RankedEntry,
    RerankReply,
    RerankRequest,
    WireProtocol,
    add_extensions,
    exact,
    score_of,
)


class TeiBody(Body):
    """The body of a request."""

    query: Query
    texts: list[str] = Field(min_length=1, max_length=10_000, fail_fast=True)
    raw_scores: Flag | None = False
    return_text: Flag | None = False
    truncate: Flag | None = None

    @override
    def to_request(self) -> RerankRequest:
        return RerankRequest(
            self.query,
            tuple(self.texts),
            truncate=self.truncate is not False,
            unit="logit" if self.raw_scores else "probability",
            return_texts=bool(self.return_text),
        )


@exact
class TeiRank(RankedEntry):
    """One passage; a reply is a list of them."""

    score: float
    text: NotRequired[str]


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Request raw logits for the unit logit; a TEI server has one model, so the request does not name it."""
    return {
        "query": request.query,
        "texts": list(request.passages),
        "raw_scores": request.unit == "logit",
        "truncate": request.truncate,
    }


def write_reply(request: RerankRequest, reply: RerankReply) -> list[TeiRank]:
    """Give scores, best first."""
    ranks: list[TeiRank] = []
    for ranked in reply.ranking:
        rank: TeiRank = {
            "index": ranked.index,
            "logit": ranked.score.logit,
            "probability": ranked.score.probability,
            "score": score_of(ranked.score, request.unit),
        }
        add_extensions(rank, ranked)
        if request.return_texts:
            rank["text"] = ranked.text
        ranks.append(rank)
    return ranks


TEI = WireProtocol(
    name="tei",
    path="/rerank",
    unit="logit",
    max_passages=32,
    max_bytes=1_900_000,
    body=TeiBody,
    write_request=write_request,
    write_reply=write_reply,
)
