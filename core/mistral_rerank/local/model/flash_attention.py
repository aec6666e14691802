"""Flash attention in packed rows, with one call of PyTorch's variable-length kernel for CUDA.

Each segment of the row is one entry of the kernel's batch: its queries are the segment's tokens, its keys those of the
prefix, if it has one, and its own. The kernel aligns queries and keys at their ends, so with causal attention each
query attends to the whole prefix.

Which kernel runs depends on the GPU and on PyTorch's version. `passes_self_check` compares its output with that of
`SpanAttention` before it is used.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mistral_rerank.local.batching.packing import copy_to, pack, segments, sequence_segments
from mistral_rerank.local.batching.planning import plan_packed
from mistral_rerank.local.model.attention import SpanAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.batching.packing import Pack

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""The largest difference between two kernels' averages of unit normal values: several rounding errors of bfloat16."""


class FlashAttention:
    """Attention with one `varlen_attn` call for a row, in float16 or bfloat16; arguments as in `RowAttention`."""

    def __init__(self, packed: Pack, window: int | None, device: torch.device) -> None:
        keys, member_keys = list(segments(packed)), sequence_segments(packed)
        left = -1 if window is None else window - 1
        window_size = (left, 0 if packed.spans[0].causal else left)
        self._all_tokens = _VarlenAttention(keys, [len(ranges[-1]) for ranges in keys], window_size, device)
        self._last_tokens = _VarlenAttention(member_keys, [1] * len(member_keys), window_size, device)

    def all_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `RowAttention.all_tokens`."""
        return self._all_tokens(query, key, value, scaling)

    def last_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `RowAttention.last_tokens`."""
        return self._last_tokens(query, key, value, scaling)


class _VarlenAttention:
    """The kernel's arguments for one kind of queries: cumulative lengths, and the indices of the keys.

    Args:
        keys: token indices of each segment's keys.
        queries: number of queries of each segment.
        window_size: (left, right) of the sliding window; -1 for no limit.
        device: of the arguments.

    """

    def __init__(
        self,
        keys: Sequence[tuple[range, ...]],
        queries: Sequence[int],
        window_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        from torch.nn.attention import varlen

        def cumulative(lengths: Sequence[int]) -> Tensor:
            return copy_to(device, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))

        lengths = [sum(map(len, ranges)) for ranges in keys]
        self._queries, self._keys = cumulative(queries), cumulative(lengths)
        self._max_queries, self._max_keys = max(queries), max(lengths)
        self._window_size = window_size
        # PyTorch 2.11 takes fewer key heads than query heads without being told, and has no argument for it
        takes_argument = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
        self._grouped_queries: dict[str, Any] = {"enable_gqa": True} if takes_argument else {}
        indices = torch.cat([torch.arange(part.start, part.stop) for ranges in keys for part in ranges])
        is_in_order = torch.equal(indices, torch.arange(len(indices)))  # no prefix is shared: no copy is needed
        self._key_indices = slice(len(indices)) if is_in_order else copy_to(device, indices)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # a no-op, except in layers on further devices
        indices = self._key_indices if isinstance(self._key_indices, slice) else self._key_indices.to(query.device)
        output = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1)[indices],
            value[0].transpose(0, 1)[indices],
            self._queries.to(query.device),
            self._keys.to(query.device),
            self._max_queries,
            self._max_keys,
            scale=scaling,
            window_size=self._window_size,
            **self._grouped_queries,
        )
        return cast("Tensor", output)


@functools.cache
def passes_self_check(heads: int, key_heads: int, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether flash attention runs on this device, with the output of `SpanAttention`; `width` is a head's."""
    prefix = list(range(20))
    sequences = [[1] * 9, [2] * 9, [3] * 70, [*prefix, *[4] * 30], [*prefix, 5], [*prefix, *[6] * 50]]
    packed = pack(*plan_packed(sequences, 1000)).padded_to_bucket()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, number, packed.ids.shape[1], width, generator=generator).to(device, dtype)
        for number in (heads, key_heads, key_heads)
    )
    last = query[:, :, packed.last.to(device)]
    try:
        for window in (None, 16):
            flash, spans = (kind(packed, window, device) for kind in (FlashAttention, SpanAttention))
            for output, expected in (
                (flash.all_tokens(query, key, value, None), spans.all_tokens(query, key, value, None)),
                (flash.last_tokens(last, key, value, None), spans.last_tokens(last, key, value, None)),
            ):
                if not bool(((output - expected).abs() < TOLERANCE).all()):
                    logger.warning("flash attention on %s fails its self-check; batches are padded instead", device)
                    return False
    except (ImportError, TypeError, RuntimeError) as error:  # PyTorch is too old, or has no kernel for this GPU
        logger.info("no flash attention on %s in %s, so batches are padded: %s", device, dtype, error)
        return False
    return True
