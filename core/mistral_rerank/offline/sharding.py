"""Sharding: pairs that share a text, and equal pairs, belong to one shard, wherever they are in the input."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUCKETS = 1 << 16


def bucket_of(shared: str) -> int:
    """Give the bucket of a shared text, under `BUCKETS`."""
    return _hash(shared) % BUCKETS


def _hash(text: str) -> int:
    """Hash a text, in all processes alike."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Sharding:
    """Divides pairs into shards of about equal size.

    A shared text has a bucket, and consecutive buckets make a shard. A bucket of more than a shard is divided by the
    other text, so that one question about many passages is spread too.

    Attributes:
        counts: number of pairs of each bucket.
        shard_pairs: number of pairs of a shard; one that ends within a bucket has up to twice as many.

    """

    counts: NDArray[np.int64]
    shard_pairs: int

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return int(self.counts.sum())

    @property
    def shards(self) -> int:
        """Number of shards; some may be empty."""
        return -(-self.pairs // self.shard_pairs)

    def shards_of(self, shared: list[str], others: list[str]) -> NDArray[np.int64]:
        """Give the shard of each pair."""
        buckets = np.array([bucket_of(text) for text in shared], dtype=np.int64)
        counts, starts = self.counts[buckets], (np.cumsum(self.counts) - self.counts)[buckets]
        parts = -(-counts // self.shard_pairs)
        hashes = [_hash(text) if parted else 0 for text, parted in zip(others, parts > 1, strict=True)]
        part = (np.array(hashes, dtype=np.uint64) % parts.astype(np.uint64)).astype(np.int64)
        shards: NDArray[np.int64] = (starts + part * counts // parts) // self.shard_pairs
        return shards
