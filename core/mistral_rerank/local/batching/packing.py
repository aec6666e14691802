"""Packing: the layout of a batch as one row of tokens without padding.

All tokens of a batch lie in one row, so the linear layers multiply one large matrix of real tokens. A prefix group has
its prefix in the row once, and each member's suffix attends to the prefix and to itself. A causal model computes the
same hidden states either way. With bidirectional attention or mean pooling no prefix is shared. Tokens whose keys and
values are cached are not in the row; the others attend to the cached ones too.

This module knows lengths and positions only. `model.attention` computes the attention between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from mistral_rerank.local.batching.planning import bucket_length

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mistral_rerank.local.batching.planning import Batch

SPAN_TOKENS = 256
"""The most suffix tokens of a prefix group that attend in one call."""

CACHED_PADDING = 4 / 3
"""In one call, the longest cached prefix may be longer than the shortest by this factor."""


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor from the CPU to a device; CUDA copies it from pinned memory, and nothing waits for that."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of a row whose attention is computed in one call.

    A span holds whole sequences of one length, the prefix of a group, or suffixes of its members.

    Attributes:
        start: the first of its tokens.
        stop: the one after its last.
        sequences: the number of whole sequences; 1 for a prefix or for suffixes.
        prefix: (start, stop) of the prefix that suffixes attend to; None for the other spans.
        suffixes: tokens of each suffix; empty for the other spans.
        causal: whether attention is causal.
        cached: the cached prefixes that its tokens attend to as well, as positions in those of the batch: one for each
            sequence, or none.

    """

    start: int
    stop: int
    sequences: int = 1
    prefix: tuple[int, int] | None = None
    suffixes: tuple[int, ...] = ()
    causal: bool = True
    cached: tuple[int, ...] = ()

    def select_keys(self, states: torch.Tensor) -> torch.Tensor:
        """Select the keys or values that the span attends to, its prefix included, as `unpack` returns them."""
        keys = self.unpack(states[:, :, self.start : self.stop])
        return keys if self.prefix is None else torch.cat([states[:, :, slice(*self.prefix)], keys], 2)

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Reshape (1, heads, tokens, width) to (sequences, heads, tokens of each, width)."""
        _, heads, _, width = states.shape
        return states.reshape(heads, self.sequences, -1, width).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Pack:
    """One row of tokens.

    Attributes:
        ids: (1, tokens) int64.
        positions: (1, tokens) int64, of each token in its sequence.
        members: those of its batch.
        last: (members,) int64, index of each member's last token in the row.
        spans: cover the row from left to right.

    """

    ids: torch.Tensor
    positions: torch.Tensor
    members: tuple[int, ...]
    last: torch.Tensor
    spans: tuple[Span, ...]

    def to(self, device: torch.device) -> Pack:
        """Copy the row to a device; `spans` stay where they are."""
        ids, positions, last = (copy_to(device, tensor) for tensor in (self.ids, self.positions, self.last))
        return replace(self, ids=ids, positions=positions, last=last)

    def padded_to_bucket(self) -> Pack:
        """Pad the row to `bucket_length` with a separate sequence that no member attends to."""
        tokens = self.ids.shape[1]
        padding = bucket_length(tokens) - tokens
        if not padding:
            return self
        ids, positions = (torch.nn.functional.pad(row, (0, padding)) for row in (self.ids, self.positions))
        return replace(self, ids=ids, positions=positions, spans=(*self.spans, Span(tokens, tokens + padding)))


def pack(batch: Batch, *, causal: bool = True) -> Pack:
    """Lay out the prefix groups of a packed batch in one row; without `causal` attention no group has a prefix.

    The cached prefixes of the batch are those of its groups, in order.
    """
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    spans: list[Span] = []
    longest_cached = number = 0
    for group in batch.groups or ():
        cached = (number,) if group.cached else ()
        number += len(cached)
        if group.prefix == group.cached:
            for member in group.members:
                start, length = len(ids), len(batch.sequences[member]) - group.cached
                ids += batch.sequences[member][group.cached :]
                positions += range(group.cached, group.cached + length)
                last.append(len(ids) - 1)
                before = spans[-1] if spans else None
                if (
                    before is not None
                    and start - before.start == length * before.sequences
                    and bool(before.cached) == bool(cached)
                    and longest_cached <= CACHED_PADDING * group.cached
                ):
                    sequences, all_cached = before.sequences + 1, (*before.cached, *cached)
                    spans[-1] = replace(before, stop=len(ids), sequences=sequences, cached=all_cached)
                else:
                    longest_cached = group.cached
                    spans.append(Span(start, len(ids), causal=causal, cached=cached))
            continue
        prefix = (len(ids), len(ids) + group.prefix - group.cached)
        ids += batch.sequences[group.members[0]][group.cached : group.prefix]
        positions += range(group.cached, group.prefix)
        spans.append(Span(*prefix, cached=cached))
        start = len(ids)
        suffixes: list[int] = []
        for member in group.members:
            suffix = batch.sequences[member][group.prefix :]
            if suffixes and len(ids) - start + len(suffix) > SPAN_TOKENS:
                spans.append(Span(start, len(ids), prefix=prefix, suffixes=tuple(suffixes), cached=cached))
                start, suffixes = len(ids), []
            ids += suffix
            positions += range(group.prefix, group.prefix + len(suffix))
            last.append(len(ids) - 1)
            suffixes.append(len(suffix))
        spans.append(Span(start, len(ids), prefix=prefix, suffixes=tuple(suffixes), cached=cached))
    return Pack(torch.tensor([ids]), torch.tensor([positions]), batch.members, torch.tensor(last), tuple(spans))


def segments(packed: Pack) -> Iterator[tuple[range, ...]]:
    """Yield the keys of each segment of a row, as token indices: its prefix, if it has one, and itself.

    A segment is a whole sequence, a prefix or a suffix. Its queries are the last of these ranges.
    """
    for span in packed.spans:
        length_of_each = (span.stop - span.start) // span.sequences
        start = span.start
        for length in span.suffixes or (length_of_each,) * span.sequences:
            segment = range(start, start + length)
            yield (segment,) if span.prefix is None else (range(*span.prefix), segment)
            start += length


def sequence_segments(packed: Pack) -> list[tuple[range, ...]]:
    """Return the token indices of each member: its prefix, if it has one, and the rest of it."""
    last = set(packed.last.tolist())
    return [ranges for ranges in segments(packed) if ranges[-1].stop - 1 in last]
