"""Cached prefixes: keys and values of the tokens that many sequences begin with, computed once.

A sequence whose prefix is cached computes its other tokens only, which attend to the cached keys too. A row may hold
such sequences beside others, whose prefixes are copied while the row runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.local.batching.packing import sequence_segments
from mistral_rerank.local.model.attention import SpanAttention

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

    from mistral_rerank.local.batching.packing import Pack


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Keys and values of the first tokens of a sequence, in every layer.

    Attributes:
        keys: (layers, tokens, key heads, width) in the dtype of the weights, with the rotary embedding applied. A layer
            has them in the order in which it computes them, so they are copied in one piece.
        values: likewise.

    """

    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class RowPrefixes:
    """The cached prefixes of a row.

    Attributes:
        cached: those of the row's groups, in order.
        new: (member, prefix): the first keys and values of a member are copied into the prefix.

    """

    cached: Sequence[CachedPrefix]
    new: Sequence[tuple[int, CachedPrefix]]


class CachedAttention(SpanAttention):
    """Attention of a row with cached prefixes. Its methods are called once for each layer, in order.

    Args:
        packed: as in `RowAttention`.
        window: likewise.
        device: likewise.
        prefixes: of the row.

    """

    def __init__(self, packed: Pack, window: int | None, device: torch.device, prefixes: RowPrefixes) -> None:
        super().__init__(packed, window, device)
        self._next_layer = 0
        self._cached = [[prefixes.cached[number] for number in span.cached] for span in packed.spans]
        self._joined: dict[int, tuple[Tensor, Tensor]] = {}
        members = sequence_segments(packed) if prefixes.new else []
        self._copies = [(_first(members[member], prefix.tokens), prefix) for member, prefix in prefixes.new]

    def _select(self, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        layer, self._next_layer = self._next_layer, self._next_layer + 1
        key_tokens, value_tokens = key[0].transpose(0, 1), value[0].transpose(0, 1)
        for ranges, prefix in self._copies:
            done = 0
            for part in ranges:
                stop = done + len(part)
                prefix.keys[layer, done:stop] = key_tokens[part.start : part.stop]
                prefix.values[layer, done:stop] = value_tokens[part.start : part.stop]
                done = stop
        for number, (span, cached) in enumerate(zip(self._spans, self._cached, strict=True)):
            own = span.select_keys(key), span.select_keys(value)
            yield self._join(number, cached, layer, *own) if cached else own

    def _join(
        self, span: int, cached: Sequence[CachedPrefix], layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put the cached keys and values of each sequence, padded to the longest, before its own."""
        longest = max(prefix.tokens for prefix in cached)
        if span not in self._joined:  # all layers use the same memory, whose padding stays zero
            sequences, heads, tokens, width = key.shape
            shape = sequences, longest + tokens, heads, width
            self._joined[span] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._joined[span]
        for sequence, prefix in enumerate(cached):
            keys[sequence, : prefix.tokens] = prefix.keys[layer]
            values[sequence, : prefix.tokens] = prefix.values[layer]
        keys[:, longest:], values[:, longest:] = key.transpose(1, 2), value.transpose(1, 2)
        return keys.transpose(1, 2), values.transpose(1, 2)


def _first(ranges: Sequence[range], tokens: int) -> list[range]:
    """Cut the token indices of a sequence to its first tokens."""
    parts = []
    for part in ranges:
        parts.append(part[:tokens])
        tokens -= len(parts[-1])
    return parts
