"""Sequences without padding, and a prefix that several of them share computed once.

All tokens of a batch lie in one row, so the linear layers see one large matrix of real tokens and nothing
else. Sequences that begin with the same ids (the same question, or the same passage, depending on the prompt)
form a tree: their common prefix is there once, and each one's rest attends to the prefix and to itself. A
causal model computes the same hidden states either way. Where tokens look ahead too, or all of them are pooled,
nothing is shared.

This file knows lengths and positions, and `attention` who sees whom; neither knows a tokenizer, weights or scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHORTEST_PREFIX = 8
"""A shared prefix of fewer tokens saves less than its own attention call costs."""

SPAN_TOKENS = 256
"""Short rests of one tree attend together, in calls of at most this many tokens."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences that share their first `prefix` ids; `members` are their positions in the batch."""

    prefix: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """How many tokens less it computes than its sequences apart."""
        return self.prefix * (len(self.members) - 1)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of a pack whose attention is one call.

    Attributes:
        start: the first of its tokens.
        stop: the one after its last.
        sequences: how many it holds whole, all of one length; 1 for a prefix, or for the rests after one.
        prefix: (start, stop) of the tokens before them that they all see; None for a whole sequence or prefix.
        suffixes: how many tokens each sequence has in it, where there is a prefix.
        causal: whether its tokens look back alone.

    """

    start: int
    stop: int
    sequences: int = 1
    prefix: tuple[int, int] | None = None
    suffixes: tuple[int, ...] = ()
    causal: bool = True

    def seen(self, states: torch.Tensor) -> torch.Tensor:
        """Take keys or values of the prefix, if there is one, and of the span, from those of all tokens, `apart`."""
        own = self.apart(states[:, :, self.start : self.stop])
        return own if self.prefix is None else torch.cat([states[:, :, slice(*self.prefix)], own], 2)

    def apart(self, states: torch.Tensor) -> torch.Tensor:
        """Take (1, heads, tokens, width) apart into its sequences: (sequences, heads, tokens of each, width)."""
        _, heads, _, width = states.shape
        return states.reshape(heads, self.sequences, -1, width).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of tokens.

    Attributes:
        ids: (1, tokens) int64.
        positions: (1, tokens) int64, each token's place in its own sequence.
        members: which sequences it holds.
        last: (members,) int64, where each of them has its last token in the row.
        spans: cover the row from left to right.

    """

    ids: torch.Tensor
    positions: torch.Tensor
    members: tuple[int, ...]
    last: torch.Tensor
    spans: tuple[Span, ...]

    def to(self, device: torch.device) -> Pack:
        """Give the same row on another device."""
        return replace(self, ids=self.ids.to(device), positions=self.positions.to(device), last=self.last.to(device))

    def padded_to_bucket(self) -> Pack:
        """Add a sequence that is no member's, so that the row is as long as `bucket_length` says."""
        tokens = self.ids.shape[1]
        filler = bucket_length(tokens) - tokens
        if not filler:
            return self
        ids, positions = (torch.nn.functional.pad(row, (0, filler)) for row in (self.ids, self.positions))
        return replace(self, ids=ids, positions=positions, spans=(*self.spans, Span(tokens, tokens + filler)))


@dataclass(frozen=True, slots=True)
class PackedCost:
    """What a row computes; one row of several computes no more than their sum.

    Attributes:
        real: its tokens, without those that fill it up.

    """

    real: int

    @property
    def tokens(self) -> int:
        """How many tokens are computed."""
        return bucket_length(self.real)

    def __add__(self, other: PackedCost) -> PackedCost:
        return PackedCost(self.real + other.real)


def bucket_length(tokens: int) -> int:
    """Round a row's tokens up, by a hundredth on average where there are many.

    A CPU's library makes its kernels anew for every number of rows, in milliseconds, and keeps them, a megabyte each.
    """
    step = _bucket_step(tokens)
    return -(-tokens // step) * step


def bucket_capacity(budget: int) -> int:
    """Give the most tokens of a row whose `bucket_length` is at most `budget`; at least 1."""
    return max(1, budget // _bucket_step(budget) * _bucket_step(budget))


def _bucket_step(tokens: int) -> int:
    return max(8, 1 << tokens.bit_length() >> 6)


def packed_cost(sequences: Sequence[Sequence[int]], *, share: bool = True) -> PackedCost:
    """Count the tokens of one row of these sequences, each shared prefix once."""
    groups = group_by_prefix(sequences, share=share)
    return PackedCost(sum(map(len, sequences)) - sum(group.saved for group in groups))


def group_by_prefix(sequences: Sequence[Sequence[int]], *, share: bool = True) -> list[PrefixGroup]:
    """Give the trees of some sequences; where they may not share anything, each is one."""
    return find_prefix_groups(sequences) if share else [PrefixGroup(0, (place,)) for place in range(len(sequences))]


def find_prefix_groups(sequences: Sequence[Sequence[int]], *, shortest: int = SHORTEST_PREFIX) -> list[PrefixGroup]:
    """Find the sequences that begin alike; every sequence is in exactly one tree.

    In lexical order sequences that begin alike are neighbours. From the longest common beginnings to shorter ones, a
    shorter one takes in what is better shared there than where it was.

    Args:
        sequences: token ids, at least one each.
        shortest: a prefix of fewer tokens is not worth sharing.

    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    open_ones: list[tuple[int, list[PrefixGroup]]] = []  # of rising common beginnings
    groups: list[PrefixGroup] = []
    for place, member in enumerate(order):
        groups = [PrefixGroup(0, (member,))]
        common = -1
        if place + 1 < len(order):
            own, other = sequences[member], sequences[order[place + 1]]
            common = _common(own, other, min(len(own), len(other)) - 1)
            common = common if common >= shortest else 0
        while open_ones and open_ones[-1][0] > common:
            prefix, gathered = open_ones.pop()
            groups = _share(prefix, gathered + groups)
        if open_ones and open_ones[-1][0] == common:
            open_ones[-1][1].extend(groups)
        else:
            open_ones.append((common, groups))
    return groups


def _share(prefix: int, groups: list[PrefixGroup]) -> list[PrefixGroup]:
    """Make one tree of those that save more with `prefix`, if together they do."""
    if not prefix:
        return groups
    better = [group for group in groups if prefix * len(group.members) > group.saved]
    members = tuple(member for group in better for member in group.members)
    joined = PrefixGroup(prefix, members)
    if joined.saved <= sum(group.saved for group in better):
        return groups
    return [group for group in groups if prefix * len(group.members) <= group.saved] + [joined]


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    for place in range(most):
        if a[place] != b[place]:
            return place
    return most


def plan_packs(sequences: Sequence[Sequence[int]], budget: int, *, share: bool = True) -> list[list[PrefixGroup]]:
    """Say which sequences share a row of at most `budget` tokens, and where they begin alike.

    A tree that is larger than the budget is cut into several, each with the prefix; a sequence that is larger has
    a row of its own. The largest trees come first.
    """
    groups = [part for group in group_by_prefix(sequences, share=share) for part in _cut(group, sequences, budget)]
    sizes = [group.prefix + sum(len(sequences[i]) - group.prefix for i in group.members) for group in groups]
    packs: list[list[PrefixGroup]] = []
    room = 0
    for place in sorted(range(len(groups)), key=lambda place: -sizes[place]):
        if not packs or sizes[place] > room:
            packs.append([])
            room = budget
        packs[-1].append(groups[place])
        room -= sizes[place]
    return packs


def _cut(group: PrefixGroup, sequences: Sequence[Sequence[int]], budget: int) -> list[PrefixGroup]:
    parts: list[list[int]] = []
    room = 0
    for member in group.members:
        rest = len(sequences[member]) - group.prefix
        if not parts or rest > room:
            parts.append([])
            room = budget - group.prefix
        parts[-1].append(member)
        room -= rest
    return [PrefixGroup(group.prefix if len(part) > 1 else 0, tuple(part)) for part in parts]


def pack(sequences: Sequence[Sequence[int]], groups: Sequence[PrefixGroup], *, causal: bool = True) -> Pack:
    """Lay the sequences of some trees out in one row, long ones first, so that those of one length are neighbours.

    Args:
        sequences: token ids.
        groups: which of them, and what they share.
        causal: whether a token looks back alone; where it does not, a tree is one sequence.

    """
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    spans: list[Span] = []
    groups = sorted(groups, key=lambda group: (group.prefix > 0, -len(sequences[group.members[0]])))
    for group in groups:
        if not group.prefix:
            for member in group.members:
                start, length = len(ids), len(sequences[member])
                ids += sequences[member]
                positions += range(length)
                last.append(len(ids) - 1)
                if spans and start - spans[-1].start == length * spans[-1].sequences:
                    spans[-1] = replace(spans[-1], stop=len(ids), sequences=spans[-1].sequences + 1)
                else:
                    spans.append(Span(start, len(ids), causal=causal))
            continue
        prefix = (len(ids), len(ids) + group.prefix)
        ids += sequences[group.members[0]][: group.prefix]
        positions += range(group.prefix)
        spans.append(Span(*prefix))
        start = len(ids)
        suffixes: list[int] = []
        for member in group.members:
            rest = sequences[member][group.prefix :]
            if suffixes and len(ids) - start + len(rest) > SPAN_TOKENS:
                spans.append(Span(start, len(ids), prefix=prefix, suffixes=tuple(suffixes)))
                start, suffixes = len(ids), []
            ids += rest
            positions += range(group.prefix, group.prefix + len(rest))
            last.append(len(ids) - 1)
            suffixes.append(len(rest))
        spans.append(Span(start, len(ids), prefix=prefix, suffixes=tuple(suffixes)))
    members = tuple(member for group in groups for member in group.members)
    return Pack(torch.tensor([ids]), torch.tensor([positions]), members, torch.tensor(last), tuple(spans))


def segments(packed: Pack) -> Iterator[tuple[range, ...]]:
    """Give the places of each stretch's keys: those of its prefix, if it has one, and its own, as its queries."""
    for span in packed.spans:
        each = (span.stop - span.start) // span.sequences
        start = span.start
        for length in span.suffixes or (each,) * span.sequences:
            own = range(start, start + length)
            yield (own,) if span.prefix is None else (range(*span.prefix), own)
            start += length


def sequence_segments(packed: Pack) -> list[tuple[range, ...]]:
    """Give the places of each member's tokens: those of its prefix, if it has one, and the others."""
    ends = set(packed.last.tolist())
    return [places for places in segments(packed) if places[-1].stop - 1 in ends]


def sequence_means(hidden: torch.Tensor, packed: Pack) -> torch.Tensor:
    """Average states (tokens, hidden) over each sequence of a row that shares nothing: (members, hidden) float32."""
    spans = ((span, hidden[span.start : span.stop]) for span in packed.spans)
    return torch.cat([states.view(span.sequences, -1, states.shape[-1]).float().mean(1) for span, states in spans])
