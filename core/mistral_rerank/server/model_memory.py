"""Several models in bounded memory: each is loaded on first use, and the least recently used one is freed for it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

from pydantic import ByteSize

from mistral_rerank._deadline import in_thread
from mistral_rerank.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.server.prometheus import Metrics

logger = logging.getLogger(__name__)


class _Loaded:
    """A model in memory, or on its way there.

    Attributes:
        loading: a task; its result is the reranker.
        weight_bytes: 0 until they are known.
        calls: number of calls that use the model, or wait for it.
        idle: set while there are none.
        last_use: the larger, the later.

    """

    loading: asyncio.Task[Reranker]

    def __init__(self, name: str) -> None:
        self.name = name
        self.weight_bytes = self.calls = self.last_use = 0
        self.idle = asyncio.Event()

    @property
    def is_busy(self) -> bool:
        return self.calls > 0 or not self.loading.done()


class ModelMemory:
    """Loads and frees models, by name. A model is loaded once, however many calls wait for it.

    A model with running calls is not freed before they end. If all are busy, the least recently used one is chosen, and
    its next calls wait until it is loaded again: so steady calls of one model do not keep another out. All methods
    belong to one event loop.

    Args:
        limit: most bytes of weights; None for no limit. The passage caches of the models have limits of their own.
        metrics: count loads, and the bytes of each model.

    """

    def __init__(self, limit: int | None, metrics: Metrics) -> None:
        self._limit, self._metrics = limit, metrics
        self._current: dict[str, _Loaded] = {}
        self._in_memory: list[_Loaded] = []
        self._making_room = asyncio.Lock()
        self._uses = count()

    @asynccontextmanager
    async def use(self, name: str, open_reranker: Callable[[], Reranker]) -> AsyncIterator[Reranker]:
        """Give the reranker of a model, which is not freed meanwhile.

        If the caller is cancelled, the load goes on. If the load fails, the next call tries again.

        Args:
            name: of the model.
            open_reranker: makes its reranker; called for each load.

        Raises:
            SettingsError: the weights alone are over the limit.
            Exception: the model cannot be loaded.

        """
        if (loaded := self._current.get(name)) is None:
            loaded = self._current[name] = _Loaded(name)
            loaded.loading = asyncio.create_task(self._load(loaded, open_reranker))
            loaded.loading.add_done_callback(_log_failure)
        loaded.last_use = next(self._uses)
        loaded.calls += 1
        loaded.idle.clear()
        try:
            yield await asyncio.shield(loaded.loading)
        finally:
            loaded.calls -= 1
            if not loaded.calls:
                loaded.idle.set()

    async def _load(self, loaded: _Loaded, open_reranker: Callable[[], Reranker]) -> Reranker:
        reranker = None
        try:
            reranker = open_reranker()
            loaded.weight_bytes = await asyncio.wrap_future(in_thread(reranker.weight_bytes))  # may download
            await self._make_room(loaded)
            await reranker.ascore_pairs([("warm", "up")])
        except BaseException:
            self._forget(loaded)
            if reranker is not None:
                await reranker.aclose()
            raise
        self._metrics.model_loads.labels(loaded.name).inc()
        self._metrics.model_weight_bytes.labels(loaded.name).set(loaded.weight_bytes)
        return reranker

    async def _make_room(self, loaded: _Loaded) -> None:
        """Free models until this one fits; loads do so one after another, in the order of their arrival."""
        if self._limit is not None and loaded.weight_bytes > self._limit:
            sizes = (ByteSize(size).human_readable() for size in (loaded.weight_bytes, self._limit))
            raise SettingsError("the model {} has {} of weights, over model_memory, {}".format(loaded.name, *sizes))
        async with self._making_room:
            while self._limit is not None and self._weight_bytes() + loaded.weight_bytes > self._limit:
                await self._free(min(self._in_memory, key=lambda each: (each.is_busy, each.last_use)))
            self._in_memory.append(loaded)

    def _weight_bytes(self) -> int:
        return sum(each.weight_bytes for each in self._in_memory)

    async def _free(self, loaded: _Loaded) -> None:
        """Close a model after its calls; those that come meanwhile load it again."""
        if self._current.get(loaded.name) is loaded:
            del self._current[loaded.name]
        await asyncio.wait({loaded.loading})
        await loaded.idle.wait()
        if loaded in self._in_memory:  # it could be loaded
            await loaded.loading.result().aclose()
            self._forget(loaded)
            self._metrics.model_weight_bytes.labels(loaded.name).set(0)
            logger.info("freed the model %s", loaded.name)

    def _forget(self, loaded: _Loaded) -> None:
        if self._current.get(loaded.name) is loaded:
            del self._current[loaded.name]
        if loaded in self._in_memory:
            self._in_memory.remove(loaded)

    async def aclose(self) -> None:
        """Close all models; loads are cancelled."""
        for loaded in {*self._current.values(), *self._in_memory}:
            loaded.loading.cancel()
            await asyncio.wait({loaded.loading})
            if loaded in self._in_memory:
                await loaded.loading.result().aclose()


def _log_failure(loading: asyncio.Task[Reranker]) -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        logger.error("a model cannot be loaded: %s", error)
