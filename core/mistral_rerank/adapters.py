"""What the LangChain and the LlamaIndex adapter share: their options, and the reranker behind them.

It knows neither framework. An adapter turns its framework's objects into texts, ranks these through
`RerankOptions`, and builds the reordered objects from the indices it gets back.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack
from weakref import WeakValueDictionary

from pydantic import ConfigDict, Field, PrivateAttr

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.forks import ForkLock
from mistral_rerank.reranker import RankedPassage, Reranker, check_query
from mistral_rerank.settings import RerankSettings
from mistral_rerank.telemetry import rerank_span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

    from mistral_rerank.telemetry import Report

_opened: WeakValueDictionary[tuple[object, ...], Reranker] = WeakValueDictionary()
_lock = ForkLock()  # opening one may import torch


class RerankerHolder(RerankSettings):
    """Settings with the reranker they describe.

    Holders with equal settings share one reranker, so a LangChain and a LlamaIndex adapter on one model hold one
    copy of its weights; it is freed with the last of them. Copies and pickles carry the settings alone.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    reranker: Reranker | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="use this one instead of opening one by the settings",
    )

    _held: Reranker | None = PrivateAttr(default=None)

    def use(self) -> Reranker:
        """Give the reranker, opened on first use; its model is loaded when it first scores."""
        if self.reranker is not None:
            return self.reranker
        key = self._key()
        with _lock:
            found = _opened.get(key)
            if found is None:
                found = _opened[key] = self.open()
        self._held = found
        return found

    @property
    def _is_open(self) -> bool:
        return self.reranker is not None or self._key() in _opened

    def unload(self) -> None:
        """Free the weights of the shared reranker, for every holder; the next use loads them again."""
        with _lock:
            found = _opened.pop(self._key(), None)
        self._held = None
        if found is not None:
            found.close()

    @property
    def used_model(self) -> str:
        """The model's name, for traces; nothing is opened for it."""
        return self.named_model if self.reranker is None else self.reranker.model_name

    def _key(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in RerankSettings.model_fields)

    def __getstate__(self) -> dict[Any, Any]:
        held, self._held = self._held, None
        try:
            return super().__getstate__()
        finally:
            self._held = held


class Overrides(TypedDict, total=False):
    """Options that one call may set differently."""

    top_n: int | None
    min_score: float | None


class RerankOptions(RerankerHolder):
    """The settings of a reranker and what an adapter keeps of its ranking."""

    top_n: int | None = Field(default=5, ge=0, description="how many to return at most; None for all")
    min_score: float | None = Field(
        default=None, ge=0, le=1, description="leave out what is under this probability, before top_n counts"
    )
    telemetry: Literal["off", "spans", "content"] = Field(
        default="off", description="whether to make an OpenTelemetry span of a call, and one that holds the texts"
    )

    def rerank(self, query: str, items: Sequence[Any], **overrides: Unpack[Overrides]) -> list[RankedPassage]:
        """Rank the framework's objects.

        Args:
            query: the question.
            items: documents or nodes.
            overrides: `top_n` and `min_score` of this call.

        Returns:
            Positions in `items`, the text that was scored and its score, best first. No items, no model is loaded.

        Raises:
            InvalidInputError: the query is blank, or an item is not of the framework's type.

        """
        texts = self._request(query, items)
        with self._span(query, texts, overrides) as report:
            return report(self.use().rank(query, texts, **self._cut(overrides)) if texts else [])

    async def arerank(self, query: str, items: Sequence[Any], **overrides: Unpack[Overrides]) -> list[RankedPassage]:
        """`rerank` without blocking the event loop."""
        texts = self._request(query, items)
        with self._span(query, texts, overrides) as report:
            if not texts:
                return report([])
            opened = self.use() if self._is_open else await asyncio.to_thread(self.use)  # it may have to import torch
            return report(await opened.arank(query, texts, **self._cut(overrides)))

    @abstractmethod
    def _texts(self, items: Sequence[Any]) -> list[str]:
        """Give what the model reads of each item."""

    def _request(self, query: str, items: Sequence[Any]) -> list[str]:
        check_query(query)
        return self._texts(items)

    def _cut(self, overrides: Overrides) -> Overrides:
        return {"top_n": self.top_n, "min_score": self.min_score, **overrides}

    def _span(self, query: str, texts: list[str], overrides: Overrides) -> AbstractContextManager[Report]:
        if self.telemetry == "off" or not texts:
            return nullcontext(_pass)
        top_n = self._cut(overrides)["top_n"]
        return rerank_span(query, texts, model=self.used_model, top_n=top_n, content=self.telemetry == "content")


def _pass(ranking: list[RankedPassage]) -> list[RankedPassage]:
    return ranking


def check_items(items: Iterable[object], wanted: type, hint: str) -> None:
    """Refuse an element of another type than the framework's, saying how to make one that fits.

    Raises:
        InvalidInputError: naming the position and the type, never the content.

    """
    for position, item in enumerate(items):
        if not isinstance(item, wanted):
            raise InvalidInputError(
                f"item {position} is a {type(item).__name__}, expected a {wanted.__name__}; {hint}"
            )
