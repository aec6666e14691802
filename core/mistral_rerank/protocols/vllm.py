"""vLLM's protocol: Cohere's with the choice of raw logits, at `/v1/rerank`.

Source: vLLM's `entrypoints/pooling/scoring/protocol.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field
from typing_extensions import override

from mistral_rerank.protocols import cohere
from mistral_rerank.protocols.protocol import Flag, NotNegative, RerankRequest, Whole, WireProtocol


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
