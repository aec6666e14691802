"""vLLM's protocol: Cohere's with the choice of raw logits, at `/v1/rerank`; and its score API, `POST /score`.

Source: vLLM's `entrypoints/pooling/scoring/protocol.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict, override

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.protocols import cohere
from mistral_rerank.protocols.protocol import (
    Flag,
    Index,
    Message,
    ModelName,
    NotNegative,
    Query,
    RerankRequest,
    Usage,
    Whole,
    WireProtocol,
    exact,
    score_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.reranker import Unit
    from mistral_rerank.scores import Pair, Score


class VllmBody(cohere.CohereBody):
    """The body of a request."""

    top_n: NotNegative | None = Field(default=None, description="0 for all")
    use_activation: Flag | None = None
    truncate_prompt_tokens: Whole | None = None

    @override
    def to_request(self) -> RerankRequest:
        return replace(
            super().to_request(),
            top_n=self.top_n or None,
            unit="logit" if self.use_activation is False else "probability",
            truncate=self.truncate_prompt_tokens is not None,
        )


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Request raw logits for the unit logit, and truncation at the model's limit."""
    return (
        cohere.write_request_v2(request)
        | {"use_activation": request.unit == "probability"}
        | ({"truncate_prompt_tokens": -1, "truncation_side": "right"} if request.truncate else {})
        | ({} if request.instruction is None else {"instruction": request.instruction})
    )


VLLM = WireProtocol(
    name="vllm",
    path="/v1/rerank",
    unit="logit",
    max_passages=512,
    takes_instruction=True,
    body=VllmBody,
    write_request=write_request,
    write_reply=cohere.write_reply,
)

Texts = Annotated[list[str], Field(min_length=1, max_length=10_000, fail_fast=True)]
Queries = Annotated[list[Query], Field(min_length=1, max_length=10_000, fail_fast=True)]


class ScoreBody(Message):
    """The body of a request: one question and any number of passages, or as many questions as passages."""

    text_1: Query | Queries = Field(description="the questions: one, or one for each passage")
    text_2: str | Texts = Field(description="the passages")
    model: ModelName | None = None
    use_activation: Flag | None = None
    truncate_prompt_tokens: Whole | None = None
    instruction: str | None = None

    @property
    def unit(self) -> Unit:
        """The unit of the scores."""
        return "logit" if self.use_activation is False else "probability"

    def pairs(self) -> list[Pair]:
        """Give (question, passage) in the request's order.

        Raises:
            InvalidInputError: there are several questions, and a different number of passages.

        """
        queries = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        passages = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(queries) == 1:
            queries = queries * len(passages)
        if len(queries) != len(passages):
            raise InvalidInputError(
                f"text_1 holds {len(queries)} texts and text_2 {len(passages)}; give one question, or one per passage"
            )
        return list(zip(queries, passages, strict=True))


@exact
class ScoreEntry(TypedDict):
    """The score of one pair."""

    index: Index
    object: Literal["score"]
    score: float


@exact
class ScoreReply(TypedDict):
    """The body of a reply."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoreEntry]
    usage: Usage


def write_score_reply(scores: Sequence[Score], *, unit: Unit, model: str, reply_id: str, created: int) -> ScoreReply:
    """Give the scores of pairs in their order; `created` is in seconds since 1970."""
    tokens = sum(score.tokens for score in scores)
    return {
        "id": reply_id,
        "object": "list",
        "created": created,
        "model": model,
        "data": [
            {"index": index, "object": "score", "score": score_of(score, unit)} for index, score in enumerate(scores)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
