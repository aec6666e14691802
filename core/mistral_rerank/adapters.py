"""Base classes of the LangChain and LlamaIndex adapters: options, and access to the shared reranker.

They use neither framework. An adapter converts its framework's objects to texts, ranks them with `RerankOptions`, and
builds the reordered objects from the indices.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict, Unpack

from pydantic import Field, PrivateAttr

from mistral_rerank._deadline import in_thread, result_within, within
from mistral_rerank._holder import RerankerHolder
from mistral_rerank._options import plain, suggest
from mistral_rerank._telemetry import rerank_span
from mistral_rerank.blending import blend
from mistral_rerank.diversity import diversify
from mistral_rerank.errors import (
    DeadlineExceededError,
    InvalidInputError,
    MissingDependencyError,
    RerankerClosedError,
    RerankError,
    SettingsError,
)
from mistral_rerank.inputs import check_query, check_ranking
from mistral_rerank.scores import UNSCORED, RankedPassage, Ranking

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import AbstractContextManager

    from mistral_rerank._telemetry import Report


logger = logging.getLogger(__name__)

RERANK_ERROR = "rerank_error"
"""Metadata key of results in the retriever's order: the class of the error that kept it."""

TOKENS, TOKENS_LEFT_OUT = "rerank_tokens", "rerank_tokens_left_out"
"""Metadata keys of `token_counts`."""

HIGHLIGHT = "rerank_highlight"
"""Metadata key of `highlight`: [start, end] of the best sentence."""

ADDED_METADATA = frozenset({RERANK_ERROR, TOKENS, TOKENS_LEFT_OUT, HIGHLIGHT})
"""Metadata keys of results; a reranker removes those of an earlier one."""

MISTAKES = (InvalidInputError, SettingsError, MissingDependencyError, RerankerClosedError)
"""Errors of the caller, which are raised also with `on_error="keep_order"`."""

_counting = Lock()
_logged: set[tuple[str, str]] = set()


class Overrides(TypedDict, total=False):
    """Options that a call can override."""

    top_n: int | None
    min_score: float | None
    max_gap: float | None
    deadline: float | None


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
    max_gap: float | None = Field(
        default=None, ge=0, description="largest distance of a result's logit from the best one's, applied before top_n"
    )
    retriever_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of the retriever's scores, or else ranks, in the order; `mistral-rerank evaluate "
        "--fit-weight` finds one",
    )
    diversity: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of a result's similarity to earlier ones, by maximal marginal relevance",
    )
    deadline: float | None = Field(
        default=None, gt=0, description="most seconds of a call; default: no limit, or an endpoint's timeout"
    )
    on_error: Literal["raise", "keep_order"] = Field(
        default="raise",
        description="if the reranker is late or fails: raise, or keep the retriever's order, with the error's name in "
        "the metadata as rerank_error",
    )
    highlight: bool = Field(
        default=False,
        description="add [start, end] of the sentence that answers best, in the text of the result, to the metadata as "
        "rerank_highlight; costs a second call",
    )
    token_counts: bool = Field(
        default=False,
        description="add the numbers of tokens read (rerank_tokens) and left out over the limit "
        "(rerank_tokens_left_out) to the metadata",
    )
    telemetry: Literal["off", "spans", "content"] = Field(
        default="off", description="OpenTelemetry spans: none, without texts, or with texts"
    )

    _shown: ClassVar[tuple[str, ...]] = ("top_n",)
    _item: ClassVar[type]
    _how_to_wrap: ClassVar[str]
    _kept_orders: Counter[str] = PrivateAttr(default_factory=Counter)

    @property
    def kept_orders(self) -> Mapping[str, int]:
        """The number of calls that kept the retriever's order, by the class of the error."""
        return dict(self._kept_orders)

    def rerank(self, query: str, items: Iterable[Any], **overrides: Unpack[Overrides]) -> Ranking:
        """Rank documents or nodes; `overrides` are `top_n`, `min_score`, `max_gap` and `deadline` of this call.

        Returns:
            Positions in `items`, the scored texts and their scores, best first. Without items no model is loaded.
            With `on_error="keep_order"` and an error: the first `top_n` items in their order, and the error.

        Raises:
            InvalidInputError: the query is blank, or an item is not of the framework's type or has no text.
            SettingsError: there is no such override.
            DeadlineExceededError: the deadline was over before there was a ranking.

        """
        start = time.monotonic()
        items, texts = self._read(query, items)
        options = self._call_options(overrides)
        with self._span(query, texts, options) as report:
            if not texts:
                return report(Ranking())
            try:
                ranking = self._rank(query, items, texts, options, start)
            except Exception as error:
                ranking = self._keep_order(texts, options, error)
            return report(ranking)

    async def arerank(self, query: str, items: Iterable[Any], **overrides: Unpack[Overrides]) -> Ranking:
        """`rerank` without blocking the event loop."""
        start = time.monotonic()
        items, texts = self._read(query, items)
        options = self._call_options(overrides)
        with self._span(query, texts, options) as report:
            if not texts:
                return report(Ranking())
            try:
                ranking = await self._arank(query, items, texts, options, start)
            except Exception as error:
                ranking = self._keep_order(texts, options, error)
            return report(ranking)

    def _rank(self, query: str, items: list[Any], texts: list[str], options: Overrides, start: float) -> Ranking:
        deadline = _from_now(options, start).get("deadline")
        opened = self.use() if deadline is None else result_within(deadline, in_thread(self.use))
        ranking = self._arranged(
            items, opened.rank(query, texts, **self._rank_options(options, start), **self._adapter), options
        )
        if self.highlight:
            contents = [self._content(items[ranked.index]) for ranked in ranking]
            deadline = _from_now(options, start).get("deadline")
            ranking.mark(opened.highlight(query, contents, deadline=deadline, **self._adapter))
        return ranking

    async def _arank(self, query: str, items: list[Any], texts: list[str], options: Overrides, start: float) -> Ranking:
        if self._is_open:
            opened = self.use()
        else:
            async with within(_from_now(options, start).get("deadline")):
                opened = await asyncio.wrap_future(in_thread(self.use))  # it may have to import torch
        ranking = await opened.arank(query, texts, **self._rank_options(options, start), **self._adapter)
        ranking = self._arranged(items, ranking, options)
        if self.highlight:
            contents = [self._content(items[ranked.index]) for ranked in ranking]
            deadline = _from_now(options, start).get("deadline")
            ranking.mark(await opened.ahighlight(query, contents, deadline=deadline, **self._adapter))
        return ranking

    def _rank_options(self, options: Overrides, start: float) -> Overrides:
        """Give the options of `rank`; the selection comes after what `_arranged` does."""
        options = _from_now(options, start)
        if not (self.retriever_weight or self.diversity) or options["top_n"] == 0:
            return options
        return {name: value for name, value in options.items() if name == "deadline"}  # type: ignore[return-value]

    def _arranged(self, items: list[Any], ranking: Ranking, options: Overrides) -> Ranking:
        """Apply `retriever_weight` and `diversity`, with the selection between them."""
        if not (self.retriever_weight or self.diversity) or options["top_n"] == 0:
            return ranking
        if self.retriever_weight:
            ranking = blend(ranking, [self._retriever_score(item) for item in items], self.retriever_weight)
        top_n, max_gap = options["top_n"], options.get("max_gap")
        if not self.diversity:
            return ranking.selected(top_n=top_n, min_score=options["min_score"], max_gap=max_gap)
        ranking = ranking.selected(top_n=None, min_score=options["min_score"], max_gap=max_gap)
        embeddings = [self._embedding(items[ranked.index]) for ranked in ranking]
        return diversify(ranking, self.diversity, top_n=top_n, embeddings=embeddings)

    def _keep_order(self, texts: list[str], options: Overrides, error: Exception) -> Ranking:
        """Give the items in their order if `on_error` says so; else raise the error."""
        if self.on_error == "raise" or isinstance(error, MISTAKES):
            raise error
        cause, model = type(error).__name__, self.used_model
        with _counting:
            self._kept_orders[cause] += 1
            is_new = (model, cause) not in _logged
            _logged.add((model, cause))
        if is_new:
            reason = f": {error}" if isinstance(error, RerankError) else ""  # another's message may hold a text
            logger.warning(
                "reranking with %s failed, and the retriever's order is kept: %s%s (each cause is logged once; "
                "kept_orders counts the calls)",
                model,
                cause,
                reason,
            )
        ranking = Ranking(RankedPassage(index, text, UNSCORED) for index, text in enumerate(texts[: options["top_n"]]))
        ranking.error = error
        return ranking

    def _result_metadata(self, ranking: Ranking, ranked: RankedPassage) -> dict[str, Any]:
        """Give the metadata of a result beside its score."""
        if ranking.error is not None:
            return {RERANK_ERROR: type(ranking.error).__name__}
        added: dict[str, Any] = {}
        if self.token_counts:
            added |= {TOKENS: ranked.score.tokens, TOKENS_LEFT_OUT: ranked.score.tokens_left_out}
        if ranked.highlight is not None:
            added[HIGHLIGHT] = list(ranked.highlight)
        return added

    def prepare(self, items: Iterable[Any]) -> None:
        """Compute documents or nodes ahead into the passage cache; see `Reranker.prepare`.

        Raises:
            InvalidInputError: an item is not of the framework's type or has no text.
            SettingsError: there is no passage cache, or the model reads the question before the passage.

        """
        self.use().prepare(self._read("?", items)[1])

    @abstractmethod
    def _text(self, item: Any) -> str:
        """Give the text of an item for the model."""

    @abstractmethod
    def _content(self, item: Any) -> str:
        """Give the text of an item without its metadata, which `highlight` refers to."""

    @abstractmethod
    def _retriever_score(self, item: Any) -> float | None:
        """Give the retriever's score of an item, if it has one."""

    @abstractmethod
    def _embedding(self, item: Any) -> list[float] | None:
        """Give the embedding of an item, if it has one."""

    def _read(self, query: str, items: Iterable[Any]) -> tuple[list[Any], list[str]]:
        """Validate the arguments of a call; give the items and their texts."""
        items = self._checked(query, items, "rerank(query, items)")
        texts = [self._text(item) for item in items]
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidInputError(
                    f"the text of item {position} is a {type(text).__name__}, expected a string; "
                    "look at its content, or at text_fn where one is set"
                )
        return items, texts

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
        newer = {"max_gap": self.max_gap, "deadline": self.deadline}  # rerankers of users may not know these
        defaults = {name: value for name, value in newer.items() if value is not None}
        options: Overrides = {"top_n": self.top_n, "min_score": self.min_score, **defaults, **values}  # type: ignore[typeddict-item]
        top_n, min_score = options["top_n"], options["min_score"]
        max_gap, deadline = options.get("max_gap"), options.get("deadline")
        check_ranking((), top_n=top_n, min_score=min_score, max_gap=max_gap, deadline=deadline)
        return options

    def _span(self, query: str, texts: list[str], options: Overrides) -> AbstractContextManager[Report]:
        if self.telemetry == "off" or not texts:
            return nullcontext(_pass)
        content = self.telemetry == "content"
        return rerank_span(query, texts, model=self.used_model, top_n=options["top_n"], content=content)


def _pass(ranking: Ranking) -> Ranking:
    return ranking


def _from_now(options: Overrides, start: float) -> Overrides:
    """Give the options of a call with what is left of a deadline that began at `start`."""
    deadline = options.get("deadline")
    if deadline is None:
        return options
    left = deadline - (time.monotonic() - start)
    if left <= 0:
        raise DeadlineExceededError(f"the deadline of {deadline:.3g} s is over; give a longer one")
    return {**options, "deadline": left}


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
