"""The prefix cache: keys and values of the tokens before the question, in bounded memory, shared by all calls.

With the passage first these are the passage's: a passage that comes back costs the question's tokens only. With the
question first they are those of an instruction or a system prompt. Keys are token ids, so texts that are tokenized
alike have one entry. The least recently used entries are evicted.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

from mistral_rerank._forks import after_fork
from mistral_rerank.local.batching.planning import SHORTEST_PREFIX
from mistral_rerank.reranker import Observer, PassageCacheInfo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from mistral_rerank.local.batching.planning import Batch

Key = tuple[str | None, bytes]
"""The adapter, None for the model itself, and the token ids of a prefix, 4 bytes each."""


class PrefixModel(Protocol):
    """What the cache needs of a model."""

    @property
    def prefix_bytes(self) -> int:
        """Bytes of a cached prefix, for one token; 0 for a model without cached prefixes."""

    def new_prefix(self, tokens: int) -> Any:
        """Allocate a cached prefix; MemoryError if it does not fit into memory."""

    def logits_with_prefixes(self, batch: Batch, cached: Sequence[Any], new: Sequence[tuple[int, Any]]) -> list[float]:
        """Score one batch with the cached prefixes of its groups, and fill new ones of some sequences.

        Raises:
            MemoryError: the batch does not fit into memory.

        """


class PrefixCache:
    """A least-recently-used cache of `limit` bytes. Thread-safe, but one thread at a time may score or put.

    A batch counts each of its distinct prefixes once, as a hit or a miss.

    Attributes:
        observer: receives the counts of each batch.
        prepared: prefixes beyond the limit, which are mapped from files and never evicted.

    """

    def __init__(self, limit: int) -> None:
        self.observer = Observer()
        self.prepared: Mapping[Key, Any] = {}
        self._limit = limit
        self._entries: OrderedDict[Key, tuple[Any, int]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._tokens_saved = 0
        self._make_lock()
        after_fork(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def info(self) -> PassageCacheInfo:
        """Return the counts so far."""
        with self._lock:
            counts = self._hits, self._misses, self._tokens_saved
            return PassageCacheInfo(*counts, entries=len(self._entries), bytes=self._bytes, limit=self._limit)

    def cached_tokens(self, keys: Sequence[Key | None]) -> list[int]:
        """Return the length of each prefix that is cached; 0 for the others."""
        with self._lock:
            return [
                _tokens(key) if key is not None and (key in self._entries or key in self.prepared) else 0
                for key in keys
            ]

    def get(self, key: Key) -> Any | None:
        """Return a prefix, which is then the most recently used; None if it is not cached."""
        with self._lock:
            if key not in self._entries:
                return self.prepared.get(key)
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, model: PrefixModel, key: Key, prefix: Any) -> None:
        """Cache a prefix that is within the limit."""
        size = _tokens(key) * model.prefix_bytes
        with self._lock:
            if key not in self._entries:
                self._evict(size)
                self._entries[key] = prefix, size
                self._bytes += size

    def begin(self, model: PrefixModel, key: Key) -> tuple[Any | None, Any | None]:
        """Return the cached prefix of a long sequence, or a new one that it shall fill, or neither: it is too large."""
        cached = self.get(key)
        self._count([key] if cached else [], [] if cached else [key])
        fits = _tokens(key) * model.prefix_bytes <= self._limit
        return cached, model.new_prefix(_tokens(key)) if cached is None and fits else None

    def score(self, model: PrefixModel, batch: Batch, keys: Sequence[Key | None]) -> list[float] | None:
        """Score a batch with the cached prefixes of its plan, and cache its other prefixes.

        Args:
            model: scores the batch.
            batch: planned with `cached_tokens`.
            keys: of its sequences; None for those without a prefix to cache.

        Returns:
            Logits; None if a prefix of the plan is no longer cached.

        Raises:
            MemoryError: the batch does not fit into memory; nothing is cached then.

        """
        groups = [keys[group.members[0]] for group in batch.groups or () if group.cached]
        in_order = [key for key in groups if key is not None]  # all of them
        cached, used = [self.get(key) for key in in_order], set(in_order)
        if None in cached:
            return None
        missing = {key: member for member, key in enumerate(keys) if key is not None and key not in used}
        sizes = {key: _tokens(key) * model.prefix_bytes for key in {*used, *missing}}
        room = self._limit - sum(sizes[key] for key in used - self.prepared.keys())
        members = {}
        for key, member in missing.items():
            if sizes[key] <= room:
                room -= sizes[key]
                members[key] = member
        with self._lock:
            self._evict(sum(sizes[key] for key in members))  # before the memory is allocated
        new = {key: model.new_prefix(_tokens(key)) for key in members}
        logits = model.logits_with_prefixes(batch, cached, [(members[key], prefix) for key, prefix in new.items()])
        for key, prefix in new.items():
            self.put(model, key, prefix)
        self._count(used, missing)
        return logits

    def take(self) -> dict[Key, Any]:
        """Remove and return all prefixes but the prepared ones."""
        with self._lock:
            prefixes = {key: prefix for key, (prefix, _) in self._entries.items()}
        self.clear()
        return prefixes

    def clear(self) -> bool:
        """Remove all prefixes but the prepared ones; True if there were any."""
        with self._lock:
            has_entries = bool(self._entries)
            self._entries.clear()
            self._bytes = 0
        self.observer.used_prefixes(0, 0, 0, 0)
        return has_entries

    def _count(self, hits: Collection[Key], misses: Collection[Key]) -> None:
        saved = sum(map(_tokens, hits))
        with self._lock:
            self._hits += len(hits)
            self._misses += len(misses)
            self._tokens_saved += saved
        self.observer.used_prefixes(len(hits), len(misses), saved, self._bytes)

    def _evict(self, size: int) -> None:
        """Remove the least recently used prefixes until there is room for `size` bytes."""
        while self._entries and self._bytes + size > self._limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self._bytes -= freed


def prefix_key(ids: Sequence[int], question: int, adapter: str | None = None) -> Key | None:
    """Make the key of the ids before a question; None if they are too few to cache."""
    tokens = min(question, len(ids) - 1)
    return (adapter, array("I", ids[:tokens]).tobytes()) if tokens >= SHORTEST_PREFIX else None


def _tokens(key: Key) -> int:
    """Return the number of tokens of a key."""
    return len(key[1]) // array("I").itemsize
