"""The score cache: exact scores of earlier pairs, in bounded memory, without their texts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

from mistral_rerank._forks import after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.scores import Pair, Score


class ScoreCache:
    """A least-recently-used cache of one reranker's scores. Thread-safe.

    Keys are digests of 16 bytes, so each of at most `size` pairs takes a few hundred bytes, however long its texts are.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores: OrderedDict[bytes, Score] = OrderedDict()
        self._make_lock()
        after_fork(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def look_up(self, pairs: Sequence[Pair], options: str) -> Lookup:
        """Look up the scores of pairs."""
        keys = [_key(pair, options) for pair in pairs]
        with self._lock:
            cached = [self._scores.get(key) for key in keys]
            for key, score in zip(keys, cached, strict=True):
                if score is not None:
                    self._scores.move_to_end(key)
        return Lookup(pairs, keys, cached, self._store)

    def clear(self) -> None:
        """Remove all scores."""
        with self._lock:
            self._scores.clear()

    def _store(self, keys: Sequence[bytes], scores: Sequence[Score]) -> None:
        with self._lock:
            self._scores.update(zip(keys, scores, strict=True))
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


class Lookup:
    """The cached scores of one call's pairs.

    Attributes:
        missing: the pairs without a cached score, in order.

    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        keys: Sequence[bytes],
        cached: list[Score | None],
        store: Callable[[Sequence[bytes], Sequence[Score]], None],
    ) -> None:
        self._keys, self._cached, self._store = keys, cached, store
        self.missing = [pair for pair, score in zip(pairs, cached, strict=True) if score is None]

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Add the scores of the missing pairs to the cache, and return those of all pairs."""
        remaining = iter(scores)
        complete = [next(remaining) if score is None else score for score in self._cached]
        self._store(self._keys, complete)
        return complete


def _key(pair: Pair, options: str) -> bytes:
    query, passage = (text.encode("utf-8", "surrogatepass") for text in pair)
    digest = blake2b(f"{len(options)}/{options}/{len(query)}/".encode(), digest_size=16)
    digest.update(query)
    digest.update(passage)
    return digest.digest()
