"""Attention in a row without padding in one call of PyTorch's flash attention for CUDA.

A sequence, or a prefix that several share, is a stretch of queries; its keys are those of its prefix, if it has one,
and its own. The kernel takes queries and keys to end together, so a causal one shows each query the whole prefix.

Which kernel runs depends on the card and on PyTorch, so `passes_self_check` compares its output with that of
`SpanAttention` before it is used.
"""

from __future__ import annotations

import functools
import itertools
import logging
from typing import TYPE_CHECKING, cast

import torch

from mistral_rerank.local.batching.packing import find_prefix_groups, pack, segments, sequence_segments
from mistral_rerank.local.model.attention import SpanAttention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.batching.packing import Pack

logger = logging.getLogger(__name__)

MOST_APART = 0.05
"""Averages of unit normal values may lie this far apart in two kernels: several times what bfloat16 rounds away."""


class FlashAttention:
    """One call of `varlen_attn` for a row; in float16 or bfloat16.

    Args:
        packed: the row, on the CPU.
        window: the most positions that a token looks back, itself included; None for all.
        device: where queries, keys and values are.

    """

    def __init__(self, packed: Pack, window: int | None, device: torch.device) -> None:
        every, members = list(segments(packed)), sequence_segments(packed)
        back = -1 if window is None else window - 1
        self._every = _Call(every, [len(keys[-1]) for keys in every], device)
        self._ends = _Call(members, [1] * len(members), device)
        self._reach = (back, 0 if packed.spans[0].causal else back)  # nothing is ahead of an end

    def all_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """See `RowAttention.all_tokens`."""
        return self._every(query, key, value, scaling, self._reach)

    def last_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """See `RowAttention.last_tokens`."""
        return self._ends(query, key, value, scaling, self._reach)


class _Call:
    """Which keys each stretch of queries sees.

    Args:
        keys: the places of each stretch's keys in the row.
        queries: how many queries each stretch has.
        device: where to keep it.

    """

    def __init__(self, keys: Sequence[tuple[range, ...]], queries: Sequence[int], device: torch.device) -> None:
        def sums(lengths: Sequence[int]) -> torch.Tensor:
            return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)

        lengths = [sum(map(len, places)) for places in keys]
        self._queries, self._keys = sums(queries), sums(lengths)
        self._most_queries, self._most_keys = max(queries), max(lengths)
        parts = [torch.arange(part.start, part.stop) for places in keys for part in places]
        self._places = torch.cat(parts).to(device)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        reach: tuple[int, int],
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        found = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1)[self._places],
            value[0].transpose(0, 1)[self._places],
            self._queries,
            self._keys,
            self._most_queries,
            self._most_keys,
            scale=scaling,
            window_size=reach,
            enable_gqa=True,
        )
        return cast("torch.Tensor", found)


@functools.cache
def passes_self_check(heads: int, key_heads: int, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether flash attention runs here and gives what `SpanAttention` gives.

    Args:
        heads: of the queries.
        key_heads: of keys and values.
        width: of a head.
        device: where it would run.
        dtype: of queries, keys and values.

    """
    question = list(range(20))
    sequences = [[1] * 9, [2] * 9, [3] * 70, [*question, *[4] * 30], [*question, 5], [*question, *[6] * 50]]
    packed = pack(sequences, find_prefix_groups(sequences)).padded_to_bucket()
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, each, packed.ids.shape[1], width, generator=draw).to(device, dtype)
        for each in (heads, key_heads, key_heads)
    )
    last = query[:, :, packed.last.to(device)]
    try:
        for window in (None, 16):
            flash, spans = (kind(packed, window, device) for kind in (FlashAttention, SpanAttention))
            for found, expected in (
                (flash.all_tokens(query, key, value, None), spans.all_tokens(query, key, value, None)),
                (flash.last_tokens(last, key, value, None), spans.last_tokens(last, key, value, None)),
            ):
                if not bool(((found - expected).abs() < MOST_APART).all()):
                    logger.warning("flash attention on %s gives other results; batches are padded instead", device)
                    return False
    except (ImportError, TypeError, RuntimeError) as error:  # PyTorch is too old, or the card has no kernel for it
        logger.info("no flash attention on %s in %s, so batches are padded: %s", device, dtype, error)
        return False
    return True
