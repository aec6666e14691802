"""Which sequences share a forward: a pure rule over their lengths.

A batch is padded to its longest row, so its cost is rows x longest. Neighbours in length share a batch, and a
batch grows until that product reaches the token budget. The longest go first: memory that is too small shows
at once, and everything later fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class PaddedCost:
    """What a padded batch computes; batches add up to the cost of all their rows in one."""

    rows: int
    longest: int

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.longest

    def __add__(self, other: PaddedCost) -> PaddedCost:
        return PaddedCost(self.rows + other.rows, max(self.longest, other.longest))


def plan_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group positions into batches of at most `budget` padded tokens, longest first.

    Returns:
        Lists of positions in `lengths`, every position once; equal lengths keep their input order.

    """
    waiting = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batches = []
    while waiting:
        rows = max(1, budget // max(1, lengths[waiting[0]]))
        batches.append(waiting[:rows])
        waiting = waiting[rows:]
    return batches
