"""The protocol of Hugging Face's text-embeddings-inference: `POST /rerank`, a bare list back.

Source: text-embeddings-inference's `router/src/http/types.rs`.
"""

from __future__ import annotations

from typing import Any, NotRequired

from pydantic import Field
from typing_extensions import override

from mistral_rerank.protocols.protocol import (
    Body,
    Flag,
    Place,
    Query,
    RerankReply,
    RerankRequest,
    WireProtocol,
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
class TeiRank(Place):
    """One passage's place; a reply is a list of them."""

    score: float
    text: NotRequired[str]


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Ask for raw logits where they are wanted; a server of this kind has one model, so it is not named."""
    return {
        "query": request.query,
        "texts": list(request.passages),
        "raw_scores": request.unit == "logit",
        "truncate": request.truncate,
    }


def write_reply(request: RerankRequest, reply: RerankReply) -> list[TeiRank]:
    """Give scores, best first."""
    ranks: list[TeiRank] = []
    for place in reply.ranking:
        rank: TeiRank = {
            "index": place.index,
            "logit": place.score.logit,
            "probability": place.score.probability,
            "score": score_of(place, request.unit),
        }
        if request.return_texts:
            rank["text"] = place.text
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
