"""Detects the protocol of a body on paths that several protocols share.

The fields decide: `texts` is TEI's, `top_k` and `truncation` are Voyage's, `use_activation` and
`truncate_prompt_tokens` are vLLM's; other bodies are Cohere's and Jina's. The JSON
schema of such a path describes the same rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from mistral_rerank.protocols.cohere import CohereBody
from mistral_rerank.protocols.tei import TeiBody
from mistral_rerank.protocols.vllm import VllmBody
from mistral_rerank.protocols.voyage import VoyageBody

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core.core_schema import CoreSchema

MARKS = {
    "tei": ("texts",),
    "voyage": ("top_k", "truncation"),
    "vllm": ("use_activation", "truncate_prompt_tokens"),
}
"""Fields of only one protocol. The first protocol with a field that is present and not null is chosen."""


class _ByMarks:
    """Adds the rule of the detection to the JSON schema of a union of bodies."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        others: list[dict[str, Any]] = []
        for name, body in zip(schema["choices"], described["oneOf"], strict=True):
            conditions: list[dict[str, Any]] = [
                {"required": [mark], "properties": {mark: {"not": {"type": "null"}}}} for mark in MARKS.get(name, ())
            ]
            body |= {"allOf": [{"$ref": body.pop("$ref")}, *([{"anyOf": conditions}] if conditions else [])]}
            if others:
                body["not"] = {"anyOf": list(others)}
            others += conditions
        return described


def _protocol_of(body: object) -> str:
    fields = body if isinstance(body, dict) else {}
    return next(
        (name for name, marks in MARKS.items() if any(fields.get(mark) is not None for mark in marks)), "cohere"
    )


def _cohere_like(body: object) -> str:
    return "cohere" if (name := _protocol_of(body)) == "tei" else name


RerankBody = Annotated[
    Annotated[VoyageBody, Tag("voyage")] | Annotated[VllmBody, Tag("vllm")] | Annotated[CohereBody, Tag("cohere")],
    Discriminator(_cohere_like),
    _ByMarks(),
]
RerankOrTeiBody = Annotated[
    Annotated[TeiBody, Tag("tei")]
    | Annotated[VoyageBody, Tag("voyage")]
    | Annotated[VllmBody, Tag("vllm")]
    | Annotated[CohereBody, Tag("cohere")],
    Discriminator(_protocol_of),
    _ByMarks(),
]
