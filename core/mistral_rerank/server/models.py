"""The models of a server, and which of them a request names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

from mistral_rerank.errors import SettingsError
from mistral_rerank.remote.reranker import RemoteReranker
from mistral_rerank.server.backlog import Backlog
from mistral_rerank.server.model_memory import ModelMemory
from mistral_rerank.server.prometheus import ModelMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from mistral_rerank.reranker import Reranker
    from mistral_rerank.server.prometheus import Metrics
    from mistral_rerank.server.settings import ServerSettings
    from mistral_rerank.settings import RerankSettings

UNNAMED = "rerank"
"""Name of the model of an endpoint for which no model was set."""


class Model(ABC):
    """A model of a server.

    Attributes:
        name: for clients.
        adapters: names of its adapters, which are models for clients too.
        backlog: the requests that wait for it.

    Args:
        name: for clients.
        reranker: opened from its settings; nothing needs to be loaded.
        metrics: of the server.

    """

    def __init__(self, name: str, reranker: Reranker, metrics: Metrics) -> None:
        self.name, self.adapters = name, reranker.adapters
        self.backlog = Backlog(reranker.max_length)
        self.observer = ModelMetrics(metrics, self.backlog)

    @abstractmethod
    def use(self) -> AbstractAsyncContextManager[Reranker]:
        """Give the reranker, which stays open meanwhile."""

    @abstractmethod
    async def load(self) -> None:
        """Load the model, by scoring one short pair."""


class OpenModel(Model):
    """A reranker that the caller has opened, and closes."""

    def __init__(self, name: str, reranker: Reranker, metrics: Metrics) -> None:
        super().__init__(name, reranker, metrics)
        self._reranker = reranker
        reranker.observe(self.observer)

    @override
    @asynccontextmanager
    async def use(self) -> AsyncIterator[Reranker]:
        yield self._reranker

    @override
    async def load(self) -> None:
        await self._reranker.ascore_pairs([("warm", "up")])


class LazyModel(Model):
    """A model that is loaded on first use.

    Raises:
        SettingsError: a setting is invalid.
        CheckpointError: there is no such folder, or nothing says how it is read.

    """

    def __init__(self, name: str, settings: RerankSettings, metrics: Metrics, memory: ModelMemory) -> None:
        if settings.backend == "local":
            from mistral_rerank.local.checkpoints.loading import check_present

            check_present(settings.named_model, settings.rerank_config)
            for _, adapter in settings.adapters:
                check_present(adapter)
        with settings.open() as unloaded:
            super().__init__(name, unloaded, metrics)
        self._settings, self._memory = settings, memory

    @override
    def use(self) -> AbstractAsyncContextManager[Reranker]:
        return self._memory.use(self.name, self._open)

    @override
    async def load(self) -> None:
        async with self.use():
            pass

    def _open(self) -> Reranker:
        reranker = self._settings.open()
        reranker.observe(self.observer)
        return reranker


class Selection(NamedTuple):
    """What a request selects: a model, and perhaps one of its adapters."""

    model: Model
    adapter: str | None

    @property
    def name(self) -> str:
        """In replies and in the list of models."""
        return self.adapter or self.model.name


class Models:
    """The models of a server by their names.

    Attributes:
        default: the first model, for requests that name none.
        all: the models.

    Args:
        rerankers: one that is open, or the settings of several by their names.
        settings: of the server.
        metrics: of the server.

    Raises:
        SettingsError: a name is ambiguous, or a setting is invalid.
        CheckpointError: as for `LazyModel`.

    """

    def __init__(
        self, rerankers: Reranker | Mapping[str, RerankSettings], settings: ServerSettings, metrics: Metrics
    ) -> None:
        self._memory = ModelMemory(settings.model_memory, metrics)
        self.all: Sequence[Model]
        if isinstance(rerankers, Mapping):
            if settings.model_id or not rerankers:
                raise SettingsError("several models have names; give at least one, and leave model_id out")
            self.all = [LazyModel(name, each, metrics, self._memory) for name, each in rerankers.items()]
        elif settings.model_memory is not None:
            raise SettingsError("model_memory is for several models; give them by name, or leave it out")
        else:
            self.all = [OpenModel(settings.model_id or _name_of(rerankers), rerankers, metrics)]
        self.default = self.all[0]
        self._by_name: dict[str, Selection] = {}
        for name in (self.default.name, *settings.aliases):
            self._add(name, Selection(self.default, None))
        for model in self.all:
            self._add(model.name, Selection(model, None))
            for adapter in model.adapters:
                self._add(adapter, Selection(model, adapter))

    def _add(self, name: str, selection: Selection) -> None:
        if self._by_name.setdefault(name, selection) != selection:
            raise SettingsError(f"{name} names the model and an adapter, or two of them; rename one")

    @property
    def known(self) -> tuple[str, ...]:
        """All names that requests may use."""
        return tuple(self._by_name)

    @property
    def selections(self) -> list[Selection]:
        """The models and their adapters, without aliases."""
        return list(dict.fromkeys(self._by_name.values()))

    def find(self, name: str | None) -> Selection | None:
        """Give what a name selects; None for an unknown name. Without a name it is the default model."""
        return self._by_name.get(self.default.name if name is None else name)

    async def aclose(self) -> None:
        """Close the models that the server has loaded itself."""
        await self._memory.aclose()


def _name_of(reranker: Reranker) -> str:
    """Give a name without a path, an address or a revision."""
    if isinstance(reranker, RemoteReranker) and reranker.model is None:
        return UNNAMED
    name = reranker.model_name
    return Path(name).resolve().name if Path(name).exists() else name.partition("@")[0]
