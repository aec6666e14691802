"""Batch planning: which sequences share a forward of at most so many tokens.

A packed row computes each real token once, and a shared prefix once. A padded batch computes rows x longest, so
sequences of similar length share one. Large batches come first: if memory is too small, the first batch shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.local.batching.packing import bucket_length
from mistral_rerank.local.batching.prefix_groups import PrefixGroup, group_by_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class PackedCost:
    """The cost of a packed row; the sum of two is an upper bound for both in one row.

    Attributes:
        real: tokens without the padding to a bucket.

    """

    real: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return bucket_length(self.real)

    def __add__(self, other: PackedCost) -> PackedCost:
        return PackedCost(self.real + other.real)


@dataclass(frozen=True, slots=True)
class PaddedCost:
    """The cost of a padded batch; the sum of two is the cost of all their rows in one batch."""

    rows: int
    longest: int

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.rows * self.longest

    def __add__(self, other: PaddedCost) -> PaddedCost:
        return PaddedCost(self.rows + other.rows, max(self.longest, other.longest))


def packed_cost(sequences: Sequence[Sequence[int]], *, share: bool = True) -> PackedCost:
    """Count the tokens of one row of these sequences, each shared prefix once."""
    groups = group_by_prefix(sequences, share=share)
    return PackedCost(sum(map(len, sequences)) - sum(group.saved for group in groups))


def plan_packs(sequences: Sequence[Sequence[int]], budget: int, *, share: bool = True) -> list[list[PrefixGroup]]:
    """Put sequences into rows of at most `budget` tokens, the largest prefix groups first.

    A prefix group over the budget is split, and each part repeats the prefix. A single sequence over the budget gets
    a row of its own.

    Returns:
        The prefix groups of each row.

    """
    groups = [part for group in group_by_prefix(sequences, share=share) for part in _split(group, sequences, budget)]
    sizes = [group.prefix + sum(len(sequences[i]) - group.prefix for i in group.members) for group in groups]
    rows: list[list[PrefixGroup]] = []
    room = 0
    for index in sorted(range(len(groups)), key=lambda index: -sizes[index]):
        if not rows or sizes[index] > room:
            rows.append([])
            room = budget
        rows[-1].append(groups[index])
        room -= sizes[index]
    return rows


def _split(group: PrefixGroup, sequences: Sequence[Sequence[int]], budget: int) -> list[PrefixGroup]:
    """Split a prefix group into parts of at most `budget` tokens."""
    parts: list[list[int]] = []
    room = 0
    for member in group.members:
        suffix = len(sequences[member]) - group.prefix
        if not parts or suffix > room:
            parts.append([])
            room = budget - group.prefix
        parts[-1].append(member)
        room -= suffix
    return [PrefixGroup(group.prefix if len(part) > 1 else 0, tuple(part)) for part in parts]


def plan_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put sequences into batches of at most `budget` padded tokens, longest first.

    Returns:
        Lists of positions in `lengths`, every position once; equal lengths keep their input order.

    """
    remaining = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batches = []
    while remaining:
        rows = max(1, budget // max(1, lengths[remaining[0]]))
        batches.append(remaining[:rows])
        remaining = remaining[rows:]
    return batches
