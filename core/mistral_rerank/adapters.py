"""Base classes of the LangChain and LlamaIndex adapters: options, and access to the shared reranker.

They use neither framework. An adapter converts its framework's objects to texts, ranks them with `RerankOptions`, and
builds the reordered objects from the indices.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypedDict, Unpack

from pydantic import ConfigDict, Field, PrivateAttr
from pydantic.json_schema import SkipJsonSchema

from mistral_rerank._options import plain, suggest
from mistral_rerank._sharing import shared
from mistral_rerank._telemetry import rerank_span
from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.reranker import RankedPassage, Reranker, check_query
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from mistral_rerank._telemetry import Report


class _Adapter(TypedDict, total=False):
    adapter: str


class RerankerHolder(RerankSettings):
    """Settings with their reranker.

    Holders with equal settings share one reranker, so a LangChain and a LlamaIndex adapter for one model have one copy
    of its weights; `mistral_rerank._sharing` describes for how long. Copies and pickles contain the settings, and a
    user's `reranker` if it can be pickled.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reranker: Annotated[Reranker | None, SkipJsonSchema()] = Field(
        default=None, exclude=True, description="a reranker to use instead of one opened from the settings"
    )

    adapter: str | None = Field(
        default=None, description="one of adapters, or another model at the endpoint; default: the model itself"
    )

    _held: Reranker | None = PrivateAttr(default=None)
    _not_compared: ClassVar[frozenset[str]] = frozenset()

    def use(self) -> Reranker:
        """Give the reranker, opened on first use; the first scoring loads its model."""
        if self.reranker is not None:
            return self.reranker
        self._held = shared.get(self)
        return self._held

    @property
    def _is_open(self) -> bool:
        return self.reranker is not None or shared.is_open(self)

    @property
    def _adapter(self) -> _Adapter:
        """The option of a call that selects the adapter; rerankers of users may not know it."""
        return {} if self.adapter is None else {"adapter": self.adapter}

    def unload(self) -> None:
        """Free the weights of the shared reranker now, for all holders; the next use loads them again."""
        self._held = None
        shared.close(self)

    @property
    def used_model(self) -> str:
        """The model's name, for traces; opens nothing."""
        return self.named_model if self.reranker is None else self.reranker.model_name

    def __eq__(self, other: object) -> bool:
        """Compare the options; whether a model is loaded makes no difference."""
        if type(other) is not type(self):
            return NotImplemented
        compared = type(self).model_fields.keys() - self._not_compared
        return all(getattr(self, name) == getattr(other, name) for name in compared)

    def __repr_args__(self) -> Iterator[tuple[str, object]]:
        """Show the main settings, then those that differ from their defaults."""
        location = "device" if self.backend == "local" else "base_url"
        yield "model", self.used_model
        if self.reranker is not None:
            yield "reranker", type(self.reranker).__name__
        else:
            yield "backend", self.backend
            yield location, getattr(self, location)
        if isinstance(self, RerankOptions):
            yield "top_n", self.top_n
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            shown = name in {"model", "backend", location, "top_n", "reranker", *self._not_compared}
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
        """Refuse serialization that would lose the reranker."""
        if self.reranker is not None:
            raise SettingsError(f"a reranker of your own cannot be serialized; {_BY_SETTINGS}")


_BY_SETTINGS = "describe it by settings (model=..., device=..., backend=...) instead of reranker=..."


class Overrides(TypedDict, total=False):
    """Options that a call can override."""

    top_n: int | None
    min_score: float | None


class RerankOptions(RerankerHolder):
    """The settings of a reranker, and the options of an adapter."""

    top_n: int | None = Field(default=5, ge=0, description="most results; None for all")
    min_score: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="lowest probability of a result, applied before top_n; `mistral-rerank calibrate --precision` "
        "finds one on your data",
    )
    telemetry: Literal["off", "spans", "content"] = Field(
        default="off", description="OpenTelemetry spans: none, without texts, or with texts"
    )

    _item: ClassVar[type]
    _how_to_wrap: ClassVar[str]

    def rerank(self, query: str, items: Iterable[Any], **overrides: Unpack[Overrides]) -> list[RankedPassage]:
        """Rank documents or nodes; `overrides` are `top_n` and `min_score` of this call.

        Returns:
            Positions in `items`, the scored texts and their scores, best first. Without items no model is loaded.

        Raises:
            InvalidInputError: the query is blank, or an item is not of the framework's type or has no text.
            SettingsError: there is no such override.

        """
        texts = self._read(query, items)
        options = self._call_options(overrides)
        with self._span(query, texts, options) as report:
            return report(self.use().rank(query, texts, **options, **self._adapter) if texts else [])

    async def arerank(self, query: str, items: Iterable[Any], **overrides: Unpack[Overrides]) -> list[RankedPassage]:
        """`rerank` without blocking the event loop."""
        texts = self._read(query, items)
        options = self._call_options(overrides)
        with self._span(query, texts, options) as report:
            if not texts:
                return report([])
            opened = self.use() if self._is_open else await asyncio.to_thread(self.use)  # it may have to import torch
            return report(await opened.arank(query, texts, **options, **self._adapter))

    def prepare(self, items: Iterable[Any]) -> None:
        """Compute documents or nodes ahead into the passage cache; see `Reranker.prepare`.

        Raises:
            InvalidInputError: an item is not of the framework's type or has no text.
            SettingsError: there is no passage cache, or the model reads the question before the passage.

        """
        self.use().prepare(self._read("?", items))

    @abstractmethod
    def _text(self, item: Any) -> str:
        """Give the text of an item for the model."""

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
        """Validate the query and the items; read the items once, into a list."""
        name = self._item.__name__
        if isinstance(items, str) and not isinstance(query, str):
            raise InvalidInputError(f"query and items are swapped; call {call}")
        if isinstance(items, (str, self._item)):
            raise InvalidInputError(f"expected a list of {name}, got one {type(items).__name__}; give [it]")
        check_query(query)  # type: ignore[arg-type]
        try:
            checked = list(items)
        except TypeError as error:
            raise InvalidInputError(f"expected a list of {name}, got a {type(items).__name__}") from error
        for position, item in enumerate(checked):
            if not isinstance(item, self._item):
                raise InvalidInputError(
                    f"item {position} is a {type(item).__name__}, expected a {name}; {self._how_to_wrap}"
                )
        return checked

    def _call_options(self, overrides: Overrides) -> Overrides:
        for name in overrides:
            if name not in Overrides.__annotations__:
                raise SettingsError(f"{name}: no option of a single call{suggest(name, Overrides.__annotations__)}")
        values = {name: plain(value) for name, value in overrides.items()}
        return {"top_n": self.top_n, "min_score": self.min_score, **values}  # type: ignore[typeddict-item]

    def _span(self, query: str, texts: list[str], options: Overrides) -> AbstractContextManager[Report]:
        if self.telemetry == "off" or not texts:
            return nullcontext(_pass)
        content = self.telemetry == "content"
        return rerank_span(query, texts, model=self.used_model, top_n=options["top_n"], content=content)


def _pass(ranking: list[RankedPassage]) -> list[RankedPassage]:
    return ranking


def copy_metadata(metadata: dict[Any, Any]) -> dict[Any, Any]:
    """Copy metadata deeply; a value that cannot be copied, such as a lock or an open file, is shared."""
    return {key: _copy(value) for key, value in metadata.items()}


def _copy(value: Any, inside: frozenset[int] = frozenset()) -> Any:
    try:
        return deepcopy(value)
    except Exception:  # from the value's own copy method
        if id(value) in inside:  # it contains itself
            return value
        inside |= {id(value)}
        if type(value) is dict:
            return {key: _copy(nested, inside) for key, nested in value.items()}
        if type(value) is list or type(value) is tuple:
            return type(value)(_copy(nested, inside) for nested in value)
        return value
