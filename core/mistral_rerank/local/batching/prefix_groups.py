"""Prefix groups: sequences that begin with the same token ids, so that a packed row holds their prefix once.

Pairs with the same question, or with the same passage, begin alike; which of the two depends on the prompt template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHORTEST_PREFIX = 8
"""Sharing a prefix of fewer tokens saves less than its own attention call costs."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences that share their first `prefix` ids; `members` are their positions in the batch."""

    prefix: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that sharing the prefix saves."""
        return self.prefix * (len(self.members) - 1)


def group_by_prefix(sequences: Sequence[Sequence[int]], *, share: bool = True) -> list[PrefixGroup]:
    """Put sequences into prefix groups; without `share` each sequence is a group of its own."""
    return find_prefix_groups(sequences) if share else [PrefixGroup(0, (i,)) for i in range(len(sequences))]


def find_prefix_groups(sequences: Sequence[Sequence[int]], *, shortest: int = SHORTEST_PREFIX) -> list[PrefixGroup]:
    """Find the sequences with a common prefix; every sequence is in exactly one group.

    In lexical order sequences with a common prefix are neighbours. Longer prefixes are tried before shorter ones; a
    shorter prefix takes over the groups for which it saves more tokens.

    Args:
        sequences: token ids, at least one each.
        shortest: the shortest prefix to share, in tokens.

    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    pending: list[tuple[int, list[PrefixGroup]]] = []  # (prefix, groups), by rising prefix
    groups: list[PrefixGroup] = []
    for rank, member in enumerate(order):
        groups = [PrefixGroup(0, (member,))]
        common = -1
        if rank + 1 < len(order):
            current, following = sequences[member], sequences[order[rank + 1]]
            common = _common_prefix(current, following, min(len(current), len(following)) - 1)
            common = common if common >= shortest else 0
        while pending and pending[-1][0] > common:
            prefix, earlier = pending.pop()
            groups = _merge(prefix, earlier + groups)
        if pending and pending[-1][0] == common:
            pending[-1][1].extend(groups)
        else:
            pending.append((common, groups))
    return groups


def _merge(prefix: int, groups: list[PrefixGroup]) -> list[PrefixGroup]:
    """Merge the groups that save more with `prefix` than with their own, if the merged group saves more in all."""
    if not prefix:
        return groups
    better = [group for group in groups if prefix * len(group.members) > group.saved]
    merged = PrefixGroup(prefix, tuple(member for group in better for member in group.members))
    if merged.saved <= sum(group.saved for group in better):
        return groups
    return [group for group in groups if prefix * len(group.members) <= group.saved] + [merged]


def _common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Count the equal ids at the start of two sequences, up to `limit`."""
    for position in range(limit):
        if a[position] != b[position]:
            return position
    return limit
