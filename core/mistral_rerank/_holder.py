"""Settings of an adapter with access to the shared reranker: opening, equality, repr and pickling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from pydantic import ConfigDict, Field, PrivateAttr
from pydantic.json_schema import SkipJsonSchema

from mistral_rerank._sharing import shared
from mistral_rerank.errors import SettingsError
from mistral_rerank.reranker import Reranker
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    _shown: ClassVar[tuple[str, ...]] = ()

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
        for name in self._shown:
            yield name, getattr(self, name)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            shown = name in {"model", "backend", location, "reranker", *self._shown, *self._not_compared}
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
