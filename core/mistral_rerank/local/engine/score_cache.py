"""Scores of pairs that were seen before: exact, bounded, and without the texts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

from mistral_rerank._forks import after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.reranker import Overflow, Pair, Score


class ScoreCache:
    """Keeps the scores of one reranker, whose model and settings do not change; the least recently used go first.

    Threads may share it. Texts are kept as digests of 16 bytes, so that a pair takes a few hundred bytes however
    long it is.

    Args:
        size: pairs that are kept at most; 0 for none.

    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores: OrderedDict[bytes, Score] = OrderedDict()
        self._make_lock()
        after_fork(self._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def look_up(self, pairs: Sequence[Pair], overflow: Overflow | None) -> Lookup:
        """Say which pairs are known."""
        if not self._size:
            return Lookup(pairs, [], [None] * len(pairs), self._keep)
        keys = [_key(pair, overflow) for pair in pairs]
        with self._lock:
            found = [self._scores.get(key) for key in keys]
            for key, score in zip(keys, found, strict=True):
                if score is not None:
                    self._scores.move_to_end(key)
        return Lookup(pairs, keys, found, self._keep)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._scores.clear()

    def _keep(self, keys: Sequence[bytes], scores: Sequence[Score]) -> None:
        with self._lock:
            self._scores.update(zip(keys, scores, strict=False))  # no keys, where nothing is kept
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


class Lookup:
    """The pairs of one call: what is known of them, and what has to be scored.

    Attributes:
        missing: the pairs that are not known, in order.

    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        keys: Sequence[bytes],
        found: list[Score | None],
        keep: Callable[[Sequence[bytes], Sequence[Score]], None],
    ) -> None:
        self._keys, self._found, self._keep = keys, found, keep
        self.missing = [pair for pair, score in zip(pairs, found, strict=True) if score is None]

    def complete(self, scores: Sequence[Score]) -> list[Score]:
        """Take the scores of the missing pairs, keep them, and give those of all."""
        new = iter(scores)
        whole = [next(new) if score is None else score for score in self._found]
        self._keep(self._keys, whole)
        return whole


def _key(pair: Pair, overflow: Overflow | None) -> bytes:
    query, passage = (text.encode("utf-8", "surrogatepass") for text in pair)
    digest = blake2b(f"{overflow}/{len(query)}/".encode(), digest_size=16)
    digest.update(query)
    digest.update(passage)
    return digest.digest()
