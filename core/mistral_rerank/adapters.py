"""What the LangChain and the LlamaIndex adapter share: their options, and the reranker behind them.

It knows neither framework. An adapter turns its framework's objects into texts, ranks these through
`RerankOptions`, and builds the reordered objects from the indices it gets back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field, PrivateAttr

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.reranker import RankedPassage, Reranker
from mistral_rerank.settings import RerankSettings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class RerankOptions(RerankSettings):
    """The settings of a reranker and what an adapter keeps of its ranking."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    top_n: int | None = Field(default=5, ge=0, description="how many to return at most; None for all")
    min_score: float | None = Field(
        default=None, ge=0, le=1, description="leave out what is under this probability, before top_n counts"
    )
    reranker: Reranker | None = Field(
        default=None,
        exclude=True,
        repr=False,
        description="use this one instead of opening one by the settings",
    )

    _opened: Reranker | None = PrivateAttr(default=None)

    def use(self) -> Reranker:
        """Give the reranker, opened on first use and kept."""
        if self.reranker is not None:
            return self.reranker
        if self._opened is None:
            self._opened = self.open()
        return self._opened

    def ranked(self, query: str, texts: Sequence[str]) -> list[RankedPassage]:
        """Rank texts with these options."""
        return self.use().rank(query, texts, top_n=self.top_n, min_score=self.min_score) if texts else []

    async def aranked(self, query: str, texts: Sequence[str]) -> list[RankedPassage]:
        """`ranked` without blocking the event loop."""
        return await self.use().arank(query, texts, top_n=self.top_n, min_score=self.min_score) if texts else []


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
