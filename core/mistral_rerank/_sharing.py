"""Shared rerankers: adapters with equal settings use one reranker, and one copy of the weights.

A local model stays loaded for `KEPT_SECONDS` after its last use, also without an adapter that references it, so that
an adapter per request does not load it each time. At most `KEPT_MODELS` stay loaded this way, the most recently used.
A model that an adapter references is not counted, and is not freed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from mistral_rerank._forks import ForkLock
from mistral_rerank.settings import DEFAULT_MODEL, LOCAL, REMOTE, RerankSettings

if TYPE_CHECKING:
    from mistral_rerank.reranker import Reranker

    Key = tuple[object, ...]

logger = logging.getLogger(__name__)

KEPT_SECONDS = 300.0
KEPT_MODELS = 2


class SharedRerankers:
    """Opens one reranker per settings, and keeps the most recently used local ones open."""

    def __init__(self, *, seconds: float = KEPT_SECONDS, models: int = KEPT_MODELS) -> None:
        self._seconds, self._models = seconds, models
        self._lock = ForkLock()  # opening one may import torch
        self._open: WeakValueDictionary[Key, Reranker] = WeakValueDictionary()
        self._kept: OrderedDict[Key, tuple[Reranker, float]] = OrderedDict()  # with the time of its last use
        self._timer: threading.Timer | None = None

    def get(self, settings: RerankSettings) -> Reranker:
        """Give the reranker of these settings; open it if there is none, or if it was closed."""
        key = _key(settings)
        dropped = None
        with self._lock:
            reranker = self._open.get(key)
            if reranker is None or reranker.is_closed:
                self._open.pop(key, None)
                self._log_second_load(key)
                reranker = self._open[key] = settings.open()
            if settings.backend == "local":
                self._kept[key] = reranker, time.monotonic()
                self._kept.move_to_end(key)
                if len(self._kept) > self._models:
                    dropped = self._kept.popitem(last=False)
                if self._timer is None or not self._timer.is_alive():
                    self._start_timer(self._seconds)
        del dropped  # outside the lock: the last reference closes the engine, which waits for its thread
        return reranker

    def is_open(self, settings: RerankSettings) -> bool:
        """Whether the reranker of these settings is open."""
        reranker = self._open.get(_key(settings))
        return reranker is not None and not reranker.is_closed

    def close(self, settings: RerankSettings) -> None:
        """Close the reranker of these settings for all holders; the next `get` opens another."""
        key = _key(settings)
        with self._lock:
            reranker = self._open.pop(key, None)
            self._kept.pop(key, None)
        if reranker is not None:
            reranker.close()

    def _release(self) -> None:
        """Release rerankers whose time is over, and restart the timer for the others."""
        dropped = []
        with self._lock:
            oldest = time.monotonic() - self._seconds
            while self._kept and (first := next(iter(self._kept.values())))[1] <= oldest:
                dropped.append(self._kept.popitem(last=False))
            if self._kept:
                self._start_timer(first[1] - oldest)
        del dropped

    def _start_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._release)
        self._timer.daemon = True
        self._timer.name = "mistral-rerank-release"
        self._timer.start()

    def _log_second_load(self, key: Key) -> None:
        for other in list(self._open):
            if other[:2] == key[:2] == ("local", key[1]):
                differing = [name for name, one, two in zip(LOCAL, key[2:], other[2:], strict=True) if one != two]
                logger.warning(
                    "%s is open already and is loaded a second time, because these settings differ: %s",
                    key[1],
                    ", ".join(differing),
                )
                return


def _key(settings: RerankSettings) -> Key:
    """Give the settings that the backend uses."""
    if settings.backend == "remote":
        return "remote", settings.model, settings.headers, *(getattr(settings, name) for name in REMOTE)
    return "local", settings.model or DEFAULT_MODEL, *(getattr(settings, name) for name in LOCAL)


shared = SharedRerankers()
