"""What the LangChain and the LlamaIndex adapter share: their options, and the reranker behind them.

It knows neither framework. An adapter turns its framework's objects into texts, ranks these through
`RerankOptions`, and builds the reordered objects from the indices it gets back.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict, Unpack

from pydantic import ConfigDict, Field, PrivateAttr
from pydantic.json_schema import SkipJsonSchema

from mistral_rerank._sharing import shared
from mistral_rerank._suggestions import suggest
from mistral_rerank._telemetry import rerank_span
from mistral_rerank._values import plain
from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.reranker import RankedPassage, Reranker, check_query
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from mistral_rerank._telemetry import Report


class RerankerHolder(RerankSettings):
    """Settings with the reranker they describe.

    Holders with equal settings share one reranker, so a LangChain and a LlamaIndex adapter on one model hold one
    copy of its weights; see `mistral_rerank._sharing` for how long. Copies and pickles carry the settings alone, and
    a `reranker` of your own where it can be pickled.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reranker: Annotated[Reranker | None, SkipJsonSchema()] = Field(
        default=None, exclude=True, description="use this one instead of opening one by the settings"
    )

    _held: Reranker | None = PrivateAttr(default=None)
    _not_compared: ClassVar[frozenset[str]] = frozenset()

    def use(self) -> Reranker:
        """Give the reranker, opened on first use; its model is loaded when it first scores."""
        if self.reranker is not None:
            return self.reranker
        self._held = shared.get(self)
        return self._held

    @property
    def _is_open(self) -> bool:
        return self.reranker is not None or shared.is_open(self)

    def unload(self) -> None:
        """Free the weights of the shared reranker at once, for every holder; the next use loads them again."""
        self._held = None
        shared.close(self)

    @property
    def used_model(self) -> str:
        """The model's name, for traces; nothing is opened for it."""
        return self.named_model if self.reranker is None else self.reranker.model_name

    def __eq__(self, other: object) -> bool:
        """Compare the options; whether a model is loaded makes no difference."""
        if type(other) is not type(self):
            return NotImplemented
        compared = type(self).model_fields.keys() - self._not_compared
        return all(getattr(self, name) == getattr(other, name) for name in compared)

    def __repr_args__(self) -> Iterator[tuple[str, object]]:
        """Show what matters most, then whatever differs from its default."""
        place = "device" if self.backend == "local" else "base_url"
        yield "model", self.used_model
        if self.reranker is not None:
            yield "reranker", type(self.reranker).__name__
        else:
            yield "backend", self.backend
            yield place, getattr(self, place)
        if isinstance(self, RerankOptions):
            yield "top_n", self.top_n
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            shown = name in {"model", "backend", place, "top_n", "reranker", *self._not_compared}
            if not shown and field.repr and value != field.default:
                yield name, value

    def __getstate__(self) -> dict[Any, Any]:
        fields, held, self._held = dict(self.__dict__), self._held, None
        try:
            state = super().__getstate__()
        finally:
            self.__dict__.update(fields)  # LlamaIndex drops what cannot be pickled, from the living object too
            self._held = held
        if self.reranker is not None and "reranker" not in state["__dict__"]:
            raise SettingsError(f"the reranker, a {type(self.reranker).__name__}, cannot be pickled; {_BY_SETTINGS}")
        return state

    def _check_dump(self) -> None:
        """Refuse to write down options that would be lost, so that what is read again is not another reranker."""
        if self.reranker is not None:
            raise SettingsError(f"a reranker of your own cannot be serialized; {_BY_SETTINGS}")


_BY_SETTINGS = "describe it by settings (model=..., device=..., backend=...) instead of reranker=..."


class Overrides(TypedDict, total=False):
    """Options that one call may set differently."""

    top_n: int | None
    min_score: float | None


class RerankOptions(RerankerHolder):
    """The settings of a reranker and what an adapter keeps of its ranking."""

    top_n: int | None = Field(default=5, ge=0, description="how many to return at most; None for all")
    min_score: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="leave out what is under this probability, before top_n counts; take the threshold that "
        "`mistral-rerank calibrate --precision` finds on your data",
    )
    telemetry: Literal["off", "spans", "content"] = Field(
        default="off", description="whether to make an OpenTelemetry span of a call, and one that holds the texts"
    )

    _item: ClassVar[type]
    _how_to_wrap: ClassVar[str]

    def rerank(self, query: str, items: Iterable[Any], **overrides: Unpack[Overrides]) -> list[RankedPassage]:
        """Rank the framework's objects.

        Args:
            query: the question.
            items: documents or nodes.
            overrides: `top_n` and `min_score` of this call.

        Returns:
            Positions in `items`, the text that was scored and its score, best first. No items, no model is loaded.

        Raises:
            InvalidInputError: the query is blank, or an item is not of the framework's type or has no text.
            SettingsError: another option than those two was given.

        """
        texts = self._read(query, items)
        cut = self._cut(overrides)
        with self._span(query, texts, cut) as report:
            return report(self.use().rank(query, texts, **cut) if texts else [])

    async def arerank(self, query: str, items: Iterable[Any], **overrides: Unpack[Overrides]) -> list[RankedPassage]:
        """`rerank` without blocking the event loop."""
        texts = self._read(query, items)
        cut = self._cut(overrides)
        with self._span(query, texts, cut) as report:
            if not texts:
                return report([])
            opened = self.use() if self._is_open else await asyncio.to_thread(self.use)  # it may have to import torch
            return report(await opened.arank(query, texts, **cut))

    @abstractmethod
    def _text(self, item: Any) -> str:
        """Give what the model reads of an item."""

    def _read(self, query: str, items: Iterable[Any]) -> list[str]:
        texts = [self._text(item) for item in self._checked(query, items, "rerank(query, items)")]
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidInputError(
                    f"the text of item {position} is a {type(text).__name__}, expected a string; "
                    "look at its content, or at text_fn where one is set"
                )
        return texts

    def _checked(self, query: object, items: Iterable[Any], call: str) -> list[Any]:
        """Give the items as a list, read once, and refuse arguments that are no query and items of the framework.

        Raises:
            InvalidInputError: naming position and type, never the content.

        """
        name = self._item.__name__
        if isinstance(items, str) and not isinstance(query, str):
            raise InvalidInputError(f"query and items are swapped; call {call}")
        if isinstance(items, (str, self._item)):
            raise InvalidInputError(f"expected a list of {name}, got one {type(items).__name__}; give [it]")
        check_query(query)  # type: ignore[arg-type]
        try:
            found = list(items)
        except TypeError as error:
            raise InvalidInputError(f"expected a list of {name}, got a {type(items).__name__}") from error
        for position, item in enumerate(found):
            if not isinstance(item, self._item):
                raise InvalidInputError(
                    f"item {position} is a {type(item).__name__}, expected a {name}; {self._how_to_wrap}"
                )
        return found

    def _cut(self, overrides: Overrides) -> Overrides:
        for name in overrides:
            if name not in Overrides.__annotations__:
                raise SettingsError(f"{name}: no option of a single call{suggest(name, Overrides.__annotations__)}")
        given = {name: plain(value) for name, value in overrides.items()}
        return {"top_n": self.top_n, "min_score": self.min_score, **given}  # type: ignore[typeddict-item]

    def _span(self, query: str, texts: list[str], cut: Overrides) -> AbstractContextManager[Report]:
        if self.telemetry == "off" or not texts:
            return nullcontext(_pass)
        content = self.telemetry == "content"
        return rerank_span(query, texts, model=self.used_model, top_n=cut["top_n"], content=content)


def _pass(ranking: list[RankedPassage]) -> list[RankedPassage]:
    return ranking


def copy_metadata(metadata: dict[Any, Any]) -> dict[Any, Any]:
    """Copy metadata in depth; a value that cannot be copied, such as a lock or an open file, is shared."""
    return {key: _copy(value) for key, value in metadata.items()}


def _copy(value: Any, inside: frozenset[int] = frozenset()) -> Any:
    try:
        return deepcopy(value)
    except Exception:  # whatever the value's own copying raises
        if id(value) in inside:  # it holds itself
            return value
        inside |= {id(value)}
        if type(value) is dict:
            return {key: _copy(nested, inside) for key, nested in value.items()}
        if type(value) is list or type(value) is tuple:
            return type(value)(_copy(nested, inside) for nested in value)
        return value
