"""The base types of the wire protocols: requests and replies independent of any protocol, and `WireProtocol`.

A protocol converts them to JSON bodies and back, without I/O, for the client (`remote`) and the server.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    with_config,
)
from typing_extensions import TypedDict

from mistral_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mistral_rerank.reranker import PassageLimits, ProtocolName, Unit
    from mistral_rerank.scores import RankedPassage, Score


def _flag(value: object) -> object:
    return FLAGS.get(value, value) if isinstance(value, str) else value


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and re.fullmatch(DIGITS, value) else value


def _or_string(schema: dict[str, Any], **strings: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [schema, {"type": "string", **strings}]})


FLAGS = {"true": True, "True": True, "false": False, "False": False}
DIGITS = r"^(0|-?[1-9][0-9]{0,8})$"
Flag = Annotated[bool, BeforeValidator(_flag), _or_string({"type": "boolean"}, enum=list(FLAGS))]
"""A boolean, or a string such as "true", which Xinference's clients send."""
Whole = Annotated[int, BeforeValidator(_whole), _or_string({"type": "integer"}, pattern=DIGITS)]
"""An integer, 5.0, or a string such as "5", which Xinference's clients send."""
Positive = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_whole),
    _or_string({"type": "integer", "minimum": 1}, pattern=r"^[1-9][0-9]{0,8}$"),
]
NotNegative = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(_whole),
    _or_string({"type": "integer", "minimum": 0}, pattern=r"^(0|[1-9][0-9]{0,8})$"),
]
ModelName = Annotated[str, AfterValidator(lambda name: name if name.strip() else None)]
"""A model's name; a blank one counts as absent."""
Query = Annotated[str, Field(json_schema_extra={"pattern": r"\S"})]
"""A question. The reranker refuses a blank one, with a better message than the pattern's."""
Index = Annotated[int, Field(ge=0, description="the passage's position in the request")]
Probability = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=0)]

exact = with_config(ConfigDict(extra="forbid"))
"""Marks the schema of a reply: this package's server sends these fields and no others."""


@exact
class Usage(TypedDict):
    """Number of tokens that the model has read."""

    prompt_tokens: Tokens
    total_tokens: Tokens


@exact
class Highlight(TypedDict):
    """The best sentence of a passage, in Unicode code points from its start."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]


@exact
class RankedEntry(TypedDict):
    """One passage in a reply of this package's server; a protocol may add fields.

    Every protocol has `logit` and `probability`, so this package's client gets the same scores and order from all of
    them, calibration included. The numbers of tokens are there if the model counts them. Other clients ignore these
    fields.
    """

    index: Index
    logit: float
    probability: Probability
    highlight: NotRequired[Highlight]
    tokens: NotRequired[Annotated[Tokens, Field(description="tokens that the model read")]]
    tokens_left_out: NotRequired[Annotated[Tokens, Field(description="tokens of the passage over the limit")]]


def add_extensions(entry: RankedEntry, ranked: RankedPassage) -> None:
    """Add the fields that are not always there."""
    if ranked.score.tokens:
        entry["tokens"], entry["tokens_left_out"] = ranked.score.tokens, ranked.score.tokens_left_out
    if ranked.highlight is not None:
        start, end = ranked.highlight
        entry["highlight"] = {"start": start, "end": end}


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """One question with its passages; replies refer to the passages by index.

    Attributes:
        model: the model's name at the endpoint; None for the model that it serves.
        truncate: whether a pair over the model's limit is truncated (the passage first) or refused.
        top_n: number of passages in the reply; None for all.
        unit: of the scores, where the protocol offers a choice.
        return_texts: whether the reply contains the passages.
        instruction: what counts as relevant; None for the server's default.
        limits: how much of each passage is read; None for no limits beside the model's.
        highlight: whether the reply says which sentence of each passage is the best.

    """

    query: str
    passages: tuple[str, ...]
    model: str | None = None
    truncate: bool = True
    top_n: int | None = None
    unit: Unit = "logit"
    return_texts: bool = False
    instruction: str | None = None
    limits: PassageLimits | None = None
    highlight: bool = False


@dataclass(frozen=True, slots=True)
class RerankReply:
    """A ranking, best first, as `Reranker.rank` gives it, with the other values of a reply."""

    ranking: tuple[RankedPassage, ...]
    model: str
    id: str
    tokens: int = 0


class Message(BaseModel):
    """A JSON object; fields that the protocol does not name are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Body(Message):
    """The body of a request; null in an optional field means absent."""

    instruction: str | None = Field(
        default=None, description="an extension of this package: what counts as relevant, for models that take one"
    )

    highlight: Flag | None = Field(
        default=False, description="an extension of this package: mark the sentence that answers best in each passage"
    )

    @abstractmethod
    def to_request(self) -> RerankRequest:
        """Convert the body to a protocol-independent request, without the extensions of this package."""

    def request(self) -> RerankRequest:
        """Convert the body to a protocol-independent request."""
        return replace(self.to_request(), instruction=self.instruction, highlight=bool(self.highlight))


@dataclass(frozen=True, slots=True)
class WireProtocol:
    """A rerank protocol over HTTP.

    Attributes:
        path: of the route, from the root of a host.
        unit: of the scores when raw logits are requested.
        max_passages: most passages of a request.
        body: schema of a request's body, for a server.
        write_request: makes the JSON body that a client sends.
        write_reply: makes the JSON body that a server sends.
        max_bytes: most bytes of a request's body.
        takes_instruction: whether its requests have an `instruction`, beyond this package's server.
        takes_limits: whether its requests have limits of a passage.
        hosted: base URL of the vendor's service, if there is one.
        key_variables: environment variables that hold the vendor's key.

    """

    name: ProtocolName
    path: str
    unit: Unit
    max_passages: int
    body: type[Body]
    write_request: Callable[[RerankRequest], dict[str, Any]]
    write_reply: Callable[[RerankRequest, RerankReply], Any]
    max_bytes: int = 4_000_000
    takes_instruction: bool = False
    takes_limits: bool = False
    hosted: str | None = None
    key_variables: tuple[str, ...] = ()

    def read_request(self, body: object) -> RerankRequest:
        """Read the decoded body of a request.

        Raises:
            InvalidInputError: names each invalid field, never its content.

        """
        try:
            return self.body.model_validate(body).request()
        except ValidationError as error:
            raise InvalidInputError(describe_fields(error.errors(include_input=False, include_url=False))) from None


MAX_FIELDS = 10
MAX_BYTES = 500
"""Of a description; an error object contains it up to three times."""


def describe_fields(problems: Sequence[Mapping[str, Any]]) -> str:
    """Describe the invalid fields without their content; at most ten of them."""
    fields = [f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}" for problem in problems[:MAX_FIELDS]]
    if len(problems) > MAX_FIELDS:
        fields.append(f"and {len(problems) - MAX_FIELDS} more")
    return "; ".join(fields).encode()[:MAX_BYTES].decode(errors="ignore")


def score_of(score: Score, unit: Unit) -> float:
    """Give the score in the requested unit."""
    return score.logit if unit == "logit" else score.probability
