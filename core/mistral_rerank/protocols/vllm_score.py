"""vLLM's score API, `POST /score`: logits or probabilities of pairs, in the request's order.

Source: vLLM's `entrypoints/pooling/scoring/protocol.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.protocols.protocol import Flag, Index, Message, ModelName, Query, Unit, Usage, Whole, exact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.reranker import Pair, Score

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
            {"index": index, "object": "score", "score": score.logit if unit == "logit" else score.probability}
            for index, score in enumerate(scores)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
