"""What every rerank protocol is made of: a request and a reply in no protocol's own words.

A protocol turns these into JSON bodies and back. Nothing here does any I/O; the client (`remote`) and the server
read the same functions from opposite ends, so they cannot drift apart.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

    from mistral_rerank.reranker import RankedPassage

Unit = Literal["logit", "probability"]


def _flag(value: object) -> object:
    return FLAGS.get(value, value) if isinstance(value, str) else value


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and re.search(DIGITS, value) else value


def _or_string(schema: dict[str, Any], **strings: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [schema, {"type": "string", **strings}]})


FLAGS = {"true": True, "True": True, "false": False, "False": False}
DIGITS = r"^-?[0-9]{1,9}$"
Flag = Annotated[bool, BeforeValidator(_flag), _or_string({"type": "boolean"}, enum=list(FLAGS))]
"""Xinference's clients send "true"."""
Whole = Annotated[int, BeforeValidator(_whole), _or_string({"type": "integer"}, pattern=DIGITS)]
"""In JSON 5.0 is an integer too, and Xinference's clients send "5"."""
Positive = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_whole),
    _or_string({"type": "integer", "minimum": 1}, pattern=r"^0{0,4}[1-9][0-9]{0,4}$"),
]
NotNegative = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(_whole),
    _or_string({"type": "integer", "minimum": 0}, pattern=r"^[0-9]{1,9}$"),
]
ModelName = Annotated[str, AfterValidator(lambda name: name if name.strip() else None)]
"""A blank name is no name."""
Query = Annotated[str, Field(json_schema_extra={"pattern": r"\S"})]
"""Is not blank; the reranker refuses those that are, and its message says more than a pattern."""
Index = Annotated[int, Field(ge=0, description="the passage's position in the request")]
Probability = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=0)]

exact = with_config(ConfigDict(extra="forbid"))
"""Of the description of a reply: a server of ours sends these fields and no others."""


@exact
class Usage(TypedDict):
    """How many tokens the model has read."""

    prompt_tokens: Tokens
    total_tokens: Tokens


@exact
class Place(TypedDict):
    """One passage's place in a reply of this package's server, whatever else the protocol says of it.

    `logit` and `probability` are there in every protocol, so that a client of this package gets the same score and
    the same order from all of them, calibration included. Other clients ignore them.
    """

    index: Index
    logit: float
    probability: Probability


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """One question with its passages.

    Attributes:
        query: the question.
        passages: in the order in which replies count them.
        model: the model's name at the endpoint; None for whichever it serves.
        truncate: whether a pair over the model's limit is cut (the passage first) or refused.
        top_n: how many of the best are wanted; None for all.
        unit: what kind of score is wanted, where the protocol lets one choose.
        return_texts: whether the reply repeats the passages.

    """

    query: str
    passages: tuple[str, ...]
    model: str | None = None
    truncate: bool = True
    top_n: int | None = None
    unit: Unit = "logit"
    return_texts: bool = False


@dataclass(frozen=True, slots=True)
class RerankReply:
    """A ranking, best first, as `Reranker.rank` gives it, and what a reply says beside it."""

    ranking: tuple[RankedPassage, ...]
    model: str
    id: str
    tokens: int = 0


class Message(BaseModel):
    """JSON as it travels; fields that a protocol does not name are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Body(Message):
    """The body of a request.

    In an optional field null means absent. Lists have a maximum length and `fail_fast`: the first item that does not
    fit ends the validation.
    """

    @abstractmethod
    def to_request(self) -> RerankRequest:
        """Give what is asked in no protocol's own words."""


@dataclass(frozen=True, slots=True)
class WireProtocol:
    """One way to ask for a ranking over HTTP.

    Attributes:
        name: the value of the setting `protocol`.
        path: where it is served, from the root of a host.
        unit: what its scores are when a raw logit is asked for.
        max_passages: how many a request may hold.
        max_bytes: how long the body of a request may be.
        body: what the body of a request looks like to a server.
        write_request: gives the JSON body that a client sends.
        write_reply: gives the JSON body that a server answers.
        hosted: the vendor's own base URL, if it is a service.
        key_variables: environment variables that hold the vendor's key.

    """

    name: str
    path: str
    unit: Unit
    max_passages: int
    body: type[Body]
    write_request: Callable[[RerankRequest], dict[str, Any]]
    write_reply: Callable[[RerankRequest, RerankReply], Any]
    max_bytes: int = 4_000_000
    hosted: str | None = None
    key_variables: tuple[str, ...] = ()

    def read_request(self, body: object) -> RerankRequest:
        """Read the decoded body of a request.

        Raises:
            InvalidInputError: naming each field that does not fit, never its content.

        """
        try:
            return self.body.model_validate(body).to_request()
        except ValidationError as error:
            raise InvalidInputError(describe_fields(error.errors(include_input=False, include_url=False))) from None


MOST_FAULTS = 10
MOST_BYTES = 500
"""Of a description, which an error object holds up to three times."""


def describe_fields(problems: Sequence[Mapping[str, Any]]) -> str:
    """Say which fields do not fit and why, without their content; at most ten of them."""
    fields = [f"{'.'.join(map(str, problem['loc'])) or 'body'}: {problem['msg']}" for problem in problems[:MOST_FAULTS]]
    if len(problems) > MOST_FAULTS:
        fields.append(f"and {len(problems) - MOST_FAULTS} more")
    return "; ".join(fields).encode()[:MOST_BYTES].decode(errors="ignore")


def score_of(place: RankedPassage, unit: Unit) -> float:
    """Give a place's score in the unit that was asked for."""
    return place.score.logit if unit == "logit" else place.score.probability
