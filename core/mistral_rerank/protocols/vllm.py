"""vLLM's contract: Cohere's with the choice of raw logits, at `/v1/rerank`.

Source: vLLM's `entrypoints/pooling/scoring/protocol.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mistral_rerank.protocols import cohere
from mistral_rerank.protocols.contract import Contract, RerankRequest, read_body


class RerankBody(cohere.RerankBody):
    """The body of a request."""

    top_n: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None


def write_request(request: RerankRequest) -> dict[str, Any]:
    """Ask for raw logits where they are wanted, and for cutting at the model's own limit."""
    return (
        cohere.write_request_v2(request)
        | {"use_activation": request.unit == "probability"}
        | ({"truncate_prompt_tokens": -1, "truncation_side": "right"} if request.truncate else {})
    )


def read_request(body: object) -> RerankRequest:
    """Read a body; `top_n` 0 means all. See `read_body` for errors."""
    read = read_body(RerankBody, body)
    plain = cohere.read_request(read.model_dump(exclude={"top_n"}))
    return replace(
        plain,
        top_n=read.top_n or None,
        unit="logit" if read.use_activation is False else "probability",
        truncate=read.truncate_prompt_tokens is not None,
    )


VLLM = Contract(
    name="vllm",
    path="/v1/rerank",
    unit="logit",
    max_passages=512,
    write_request=write_request,
    read_request=read_request,
    write_reply=cohere.write_reply,
)
