"""Batch planning: from token ids to batches within a token budget.

A packed row computes each real token once, and the prefix of a prefix group once. Pairs with the same question, or with
the same passage, begin alike; which of the two depends on the prompt template. A padded batch computes rows x longest,
so sequences of similar length share one. Large batches come first: if memory is too small, the first batch shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

SHORTEST_PREFIX = 8
"""Sharing a prefix of fewer tokens saves less than its own attention call costs."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences that share their first `prefix` ids; `members` are their positions.

    The first `cached` ids are not computed: their keys and values are cached.
    """

    prefix: int
    members: tuple[int, ...]
    cached: int = 0

    @property
    def saved(self) -> int:
        """Tokens that the cache, and sharing the rest of the prefix, save."""
        return self.cached * len(self.members) + (self.prefix - self.cached) * (len(self.members) - 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that share a forward, in the order of their rows or in a packed row.

    Attributes:
        sequences: token ids.
        members: positions of the sequences among those that the batch was made of.
        groups: of a packed row, from left to right, with positions in `sequences`; None for padded rows.
        real_tokens: tokens of a packed row without the padding to a bucket; rows x longest of padded rows.
        tokens: tokens that the forward computes, padding included.
        frequencies: what the rotary frequencies of all its sequences depend on.

    """

    sequences: tuple[Sequence[int], ...]
    members: tuple[int, ...]
    groups: tuple[PrefixGroup, ...] | None
    real_tokens: int
    tokens: int
    frequencies: tuple[int, ...] = ()

    def select(self, positions: Iterable[int]) -> Batch:
        """Make a batch of some of the sequences; its `members` are positions in this one."""
        if self.groups is None:
            batch = _padded(self.sequences, sorted(positions))
        else:
            selected = set(positions)
            kept = [tuple(member for member in group.members if member in selected) for group in self.groups]
            groups = [
                _group(group.prefix, members, group.cached)
                for group, members in zip(self.groups, kept, strict=True)
                if members
            ]
            batch = _packed(self.sequences, groups)
        return replace(batch, frequencies=self.frequencies)


def join(batches: Sequence[Batch]) -> Batch:
    """Join batches with the same frequencies; `members` are positions in their concatenated sequences."""
    sequences = [ids for batch in batches for ids in batch.sequences]
    if batches[0].groups is None:
        batch = _padded(sequences, sorted(range(len(sequences)), key=lambda position: -len(sequences[position])))
    else:
        starts = accumulate((len(batch.sequences) for batch in batches), initial=0)
        groups = [
            PrefixGroup(group.prefix, tuple(start + member for member in group.members), group.cached)
            for start, batch in zip(starts, batches, strict=False)
            for group in batch.groups or ()
        ]
        batch = _packed(sequences, groups)
    return replace(batch, frequencies=batches[0].frequencies)


def joined_tokens(batches: Sequence[Batch]) -> int:
    """Count the tokens that the joined batches compute, padding included."""
    if batches[0].groups is None:
        return sum(len(batch.sequences) for batch in batches) * max(len(batch.sequences[0]) for batch in batches)
    return bucket_length(sum(batch.real_tokens for batch in batches))


def plan_packed(
    sequences: Sequence[Sequence[int]], budget: int, *, share: bool = True, cached: Sequence[int] = ()
) -> list[Batch]:
    """Put sequences into rows of at most `budget` tokens, the largest prefix groups first.

    A prefix group over the budget is split, and each part repeats the prefix. A single sequence over the budget gets
    a row of its own. Without `share` no prefix is shared.

    Args:
        sequences: token ids, at least one each.
        budget: the most tokens of a row.
        share: whether prefixes are shared.
        cached: the number of each sequence's first tokens that are not computed, fewer than all; empty for none.

    """
    groups = [PrefixGroup(0, (member,)) for member in range(len(sequences))]
    if share:
        by_cached: dict[tuple[int, ...], list[int]] = {}
        for member, tokens in enumerate(cached or [0] * len(sequences)):
            by_cached.setdefault(tuple(sequences[member][:tokens]), []).append(member)
        groups = [
            PrefixGroup(len(ids) + part.prefix, tuple(members[rest] for rest in part.members), len(ids))
            for ids, members in by_cached.items()
            for part in _find_and_split([sequences[member][len(ids) :] for member in members], budget)
        ]
    sizes = [sum(len(sequences[member]) for member in group.members) - group.saved for group in groups]
    rows: list[list[int]] = []
    room = 0
    for index in sorted(range(len(groups)), key=lambda index: -sizes[index]):
        if not rows or sizes[index] > room:
            rows.append([])
            room = budget
        rows[-1].append(index)
        room -= sizes[index]
    return [_packed(sequences, [groups[index] for index in sorted(row)]) for row in rows]


def plan_padded(sequences: Sequence[Sequence[int]], budget: int) -> list[Batch]:
    """Put sequences into batches of at most `budget` padded tokens, longest first; equal lengths keep their order."""
    remaining = sorted(range(len(sequences)), key=lambda position: -len(sequences[position]))
    batches = []
    while remaining:
        rows = max(1, budget // max(1, len(sequences[remaining[0]])))
        batches.append(_padded(sequences, remaining[:rows]))
        remaining = remaining[rows:]
    return batches


def plan_by_frequencies(
    plan: Callable[[Sequence[Sequence[int]]], list[Batch]],
    sequences: Sequence[Sequence[int]],
    frequencies: Mapping[tuple[int, ...], Sequence[int]],
) -> list[Batch]:
    """Plan sequences with the same rotary frequencies, whose positions `frequencies` has, apart from the others."""
    return [
        replace(batch, frequencies=key, members=tuple(members[member] for member in batch.members))
        for key, members in frequencies.items()
        for batch in plan([sequences[member] for member in members])
    ]


def bucket_length(tokens: int) -> int:
    """Round the length of a row up; long rows get 1% longer on average.

    oneDNN compiles and caches kernels for every number of rows: milliseconds and a megabyte for each.
    """
    step = max(8, 1 << tokens.bit_length() >> 6)
    return -(-tokens // step) * step


def bucket_capacity(budget: int) -> int:
    """Return the longest row whose `bucket_length` is at most `budget`; at least 1."""
    step = max(8, 1 << budget.bit_length() >> 6)
    return max(1, budget // step * step)


def find_prefix_groups(sequences: Sequence[Sequence[int]], *, shortest: int = SHORTEST_PREFIX) -> list[PrefixGroup]:
    """Find the sequences with a common prefix; every sequence is in exactly one group.

    In lexical order, which members keep, sequences with a common prefix are neighbours. Longer prefixes are tried
    before shorter ones; a shorter prefix takes over the groups for which it saves more tokens.

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
            common = _common_prefix(sequences[member], sequences[order[rank + 1]])
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


def _find_and_split(sequences: Sequence[Sequence[int]], budget: int) -> list[PrefixGroup]:
    """Find prefix groups, and split those over the budget."""
    return [part for group in find_prefix_groups(sequences) for part in _split(group, sequences, budget)]


def _split(group: PrefixGroup, sequences: Sequence[Sequence[int]], budget: int) -> list[PrefixGroup]:
    """Split a prefix group into parts of at most `budget` tokens; a part may have a longer prefix than the group."""
    parts: list[list[int]] = []
    room = 0
    for member in group.members:
        suffix = len(sequences[member]) - group.prefix
        if not parts or suffix > room:
            parts.append([])
            room = budget - group.prefix
        parts[-1].append(member)
        room -= suffix
    if len(parts) == 1:
        return [group]
    return [_group(_common_prefix(sequences[part[0]], sequences[part[-1]]), tuple(part)) for part in parts]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the equal ids at the start of two sequences; each keeps at least one id for itself."""
    limit = min(len(a), len(b)) - 1
    return next((position for position in range(limit) if a[position] != b[position]), limit)


def _group(prefix: int, members: tuple[int, ...], cached: int = 0) -> PrefixGroup:
    """Make a group; a single sequence has no prefix but the cached one."""
    return PrefixGroup(prefix if len(members) > 1 else cached, members, cached)


def _packed(sequences: Sequence[Sequence[int]], groups: Iterable[PrefixGroup]) -> Batch:
    """Make a batch of prefix groups: longest first, so that single sequences of one length are neighbours.

    Those with a cached prefix come last, by the length of the rest.
    """

    def order(group: PrefixGroup) -> tuple[bool, bool, int, int]:
        rest = len(sequences[group.members[0]]) - group.cached
        return group.cached > 0, group.prefix > group.cached, -rest, -group.cached

    ordered = sorted(groups, key=order)
    members = tuple(member for group in ordered for member in group.members)
    chosen = tuple(sequences[member] for member in members)
    starts = accumulate((len(group.members) for group in ordered), initial=0)
    positions = [
        PrefixGroup(group.prefix, tuple(range(start, start + len(group.members))), group.cached)
        for start, group in zip(starts, ordered, strict=False)
    ]
    real_tokens = sum(map(len, chosen)) - sum(group.saved for group in ordered)
    return Batch(chosen, members, tuple(positions), real_tokens, bucket_length(real_tokens))


def _padded(sequences: Sequence[Sequence[int]], members: Sequence[int]) -> Batch:
    """Make a batch of padded rows; the first is the longest."""
    chosen = tuple(sequences[member] for member in members)
    tokens = len(chosen) * len(chosen[0])
    return Batch(chosen, tuple(members), None, tokens, tokens)
