"""Attention in a row of sequences without padding: who sees whom, and the kernels that compute it.

It is used by our own forward, as a `RowAttention`, and by transformers' modules in training, under a name of its own.
Here a span is a call of `scaled_dot_product_attention`, on any device; `flash` needs one call for a row, on CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.batching.packing import Pack, Span

PACKED_ATTENTION = "mistral_rerank_packed"
"""The name of `packed_attention` among transformers' attention functions."""

PLAIN_SCORES = 400**2
"""With so many pairs of a query and a key, all scores still fit into a core's cache."""


class RowAttention(Protocol):
    """Attention in one row, whose sequences see themselves and what they share.

    Queries are (1, heads, tokens, width), keys and values (1, key heads, tokens, width); `scaling` is that of the
    scores before the softmax, None for 1 / sqrt(width).
    """

    def __init__(self, packed: Pack, window: int | None, device: torch.device) -> None: ...

    def all_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Give (tokens, heads, width)."""

    def last_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Give (members, heads, width) for queries of the members' last tokens alone."""


class SpanAttention:
    """A call of `scaled_dot_product_attention` for each span of a row.

    Args:
        packed: the row, on the CPU.
        window: the most positions that a token looks back, itself included; None for all.
        device: where queries, keys and values are.

    """

    def __init__(self, packed: Pack, window: int | None, device: torch.device) -> None:
        self._spans, self._ends = packed.spans, packed.last.tolist()
        self._masks = span_masks(packed.to(device), window=window)

    def all_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """See `RowAttention.all_tokens`."""
        return attend_spans(query, key, value, self._spans, self._masks, scaling)

    def last_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """See `RowAttention.last_tokens`."""
        done, mixed = 0, []
        for span, mask in zip(self._spans, self._masks, strict=True):
            ends = [place - span.start for place in self._ends[done:] if place < span.stop]
            if not ends:
                continue  # a prefix: no sequence ends in it
            own = span.apart(query[:, :, done : done + len(ends)])
            seen = None if mask is None else mask[ends[: own.shape[2]]]
            found = attend(own, span.seen(key), span.seen(value), seen, scaling)
            mixed.append(found.transpose(1, 2).flatten(0, 1))
            done += len(ends)
        return torch.cat(mixed)


def span_masks(packed: Pack, *, window: int | None = None) -> list[torch.Tensor | None]:
    """Say for every span which keys its tokens see.

    Args:
        packed: the row.
        window: the most positions that a token looks back, itself included; None for all.

    Returns:
        One (tokens, keys) bool mask a span, on the row's device: the tokens are those of the span, or of each of its
        sequences, and the keys are the prefix and then the same tokens. None where plain attention, causal or not as
        the span says, is the same.

    """
    places = packed.positions[0]
    masks: list[torch.Tensor | None] = []
    for span in packed.spans:
        queries = places[span.start : span.stop]
        if span.prefix is None:
            queries = queries[: len(queries) // span.sequences]
            if window is None or len(queries) <= window:
                masks.append(None)
                continue
            keys = queries
            seen = (keys <= queries[:, None]) | (not span.causal)
        else:
            owner = torch.repeat_interleave(torch.arange(len(span.suffixes)), torch.tensor(span.suffixes)).to(
                places.device
            )
            keys = torch.cat([places[slice(*span.prefix)], queries])
            own = (owner[:, None] == owner) & (queries <= queries[:, None])
            seen = torch.cat([own.new_ones(len(queries), span.prefix[1] - span.prefix[0]), own], 1)
        if window is not None:
            seen = seen & (keys > queries[:, None] - window) & (keys < queries[:, None] + window)
        masks.append(seen)
    return masks


def packed_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: None,
    *,
    spans: Sequence[Span],
    masks: Sequence[torch.Tensor | None],
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Give `attend_spans` the form of transformers' attention functions, and its result (1, tokens, heads, width)."""
    return attend_spans(query, key, value, spans, masks, scaling)[None], None


def attend_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    masks: Sequence[torch.Tensor | None],
    scaling: float | None,
) -> torch.Tensor:
    """Attention of a pack.

    Args:
        query: (1, heads, tokens, width).
        key: (1, key heads, tokens, width).
        value: as `key`.
        spans: of the pack.
        masks: what `span_masks` says of it, on the device of `query`.
        scaling: of the scores before the softmax; None for 1 / sqrt(width).

    Returns:
        (tokens, heads, width).

    """
    outputs = []
    for span, mask in zip(spans, masks, strict=True):
        own = span.apart(query[:, :, span.start : span.stop])
        causal = span.causal and mask is None
        found = attend(own, span.seen(key), span.seen(value), mask, scaling, is_causal=causal)
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention with fewer key heads than query heads; shapes as `Span.apart` gives them, the result as the query."""
    if query.requires_grad and query.device.type == "cpu" and query.shape[2] * key.shape[2] <= PLAIN_SCORES:
        return _attend_plainly(query, key, value, mask, scaling, is_causal=is_causal)
    if mask is not None and query.device.type == "cuda":  # with a mask its fast kernels take equal numbers of heads
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    )


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    *,
    is_causal: bool,
) -> torch.Tensor:
    """Attention as products and a softmax, whose backward pass on a CPU takes a third of the fused kernel's time."""
    (sequences, _, tokens, width), heads = query.shape, key.shape[1]
    if is_causal:
        mask = query.new_ones(tokens, key.shape[2], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):
        scaled = query * (width**-0.5 if scaling is None else scaling)
        scores = scaled.reshape(sequences, heads, -1, width) @ key.transpose(-1, -2)
        if mask is not None:
            unseen = scores.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
            scores = (scores.view(sequences, heads, -1, *mask.shape) + unseen).view(scores.shape)
        return (scores.softmax(-1) @ value).view(query.shape)


def register() -> None:
    """Make `packed_attention` known to transformers under `PACKED_ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
