"""NVIDIA's protocol: a NIM container's `POST /v1/ranking`, and the same body at the hosted `.../reranking`.

Source: https://docs.nvidia.com/nim/nemo-retriever/text-reranking/latest/using-reranking.html
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from typing_extensions import TypedDict, override

from mistral_rerank.protocols.protocol import (
    Body,
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
)


class Text(Message):
    """A passage."""

    text: str


class QueryText(Message):
    """A question."""

    text: Query


class RankingBody(Body):
    """The body of a request."""

    query: QueryText
    passages: list[Text] = Field(min_length=1, max_length=512, fail_fast=True)
    model: ModelName | None = None
    truncate: Literal["NONE", "END"] | None = "NONE"
    top_k: Positive | None = Field(default=None, description="not in the NIM API; LiteLLM sends it to hosted models")

    @override
    def to_request(self) -> RerankRequest:
        return RerankRequest(
            self.query.text,
            tuple(passage.text for passage in self.passages),
            model=self.model,
            truncate=self.truncate == "END",
            top_n=self.top_k,
        )


@exact
class RankingReply(TypedDict):
    """The body of a reply."""

    rankings: list[RankedEntry]
    usage: Usage


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Use only fields of every version of the protocol, because newer NIMs refuse others."""
    model = {} if request.model is None else {"model": request.model}
    return model | {
        "query": {"text": request.query},
        "passages": [{"text": passage} for passage in request.passages],
        "truncate": "END" if request.truncate else "NONE",
    }


def write_reply(_request: RerankRequest, reply: RerankReply) -> RankingReply:
    """Give raw logits, best first; the other fields are additions to the protocol."""
    rankings: list[RankedEntry] = []
    for ranked in reply.ranking:
        entry: RankedEntry = {
            "index": ranked.index,
            "logit": ranked.score.logit,
            "probability": ranked.score.probability,
        }
        add_extensions(entry, ranked)
        rankings.append(entry)
    return {
        "rankings": rankings,
        "usage": {"prompt_tokens": reply.tokens, "total_tokens": reply.tokens},
    }


NVIDIA = WireProtocol(
    name="nvidia",
    path="/v1/ranking",
    unit="logit",
    max_passages=512,
    body=RankingBody,
    write_request=write_request,
    write_reply=write_reply,
    hosted="https://ai.api.nvidia.com",
    key_variables=("NVIDIA_API_KEY",),
)
