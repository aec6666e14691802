"""Attention in packed rows: masks, and one `scaled_dot_product_attention` call for each span, on any device.

Inference uses `SpanAttention`. Training uses `packed_attention`, which is registered as an attention function of
transformers. `flash_attention` computes the same with one call a row, on CUDA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mistral_rerank.local.batching.packing import Pack, Span

PACKED_ATTENTION = "mistral_rerank_packed"
"""The name of `packed_attention` among transformers' attention functions."""

PLAIN_SCORES = 400**2
"""Up to this many attention scores a head fit into a core's cache."""


class RowAttention(Protocol):
    """Attention in one packed row: each sequence attends to itself and its prefix.

    The row is on the CPU. `window` is the sliding window, in tokens, the token itself included; None for no window.
    Queries are (1, heads, tokens, width), keys and values (1, key heads, tokens, width). `scaling` multiplies the
    scores before the softmax; None for 1 / sqrt(width).
    """

    def __init__(self, packed: Pack, window: int | None, device: torch.device) -> None: ...

    def all_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of all tokens: (tokens, heads, width)."""

    def last_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention of the members' last tokens only, whose queries are given: (members, heads, width)."""


class SpanAttention:
    """Attention with one `scaled_dot_product_attention` call for each span of a row; arguments as in `RowAttention`."""

    def __init__(self, packed: Pack, window: int | None, device: torch.device) -> None:
        self._spans, self._last = packed.spans, packed.last.tolist()
        self._masks = span_masks(packed.to(device), window=window)

    def all_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `RowAttention.all_tokens`."""
        return attend_spans(query, self._select(key, value), self._spans, self._masks, scaling)

    def last_tokens(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `RowAttention.last_tokens`."""
        done, outputs = 0, []
        selected = self._select(key, value)
        for span, mask, (keys, values) in zip(self._spans, self._masks, selected, strict=True):
            last = [index - span.start for index in self._last[done:] if index < span.stop]
            if not last:
                continue  # a prefix: no sequence ends in it
            queries = span.unpack(query[:, :, done : done + len(last)])
            last_mask = None if mask is None else mask[..., last[: queries.shape[2]], :]
            output = attend(queries, keys, values, last_mask, scaling)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
            done += len(last)
        return torch.cat(outputs)

    def _select(self, key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys and values that each span attends to, as `Span.unpack` returns them."""
        return _select(self._spans, key, value)


def window_of(backbone: Any) -> int | None:
    """Return the sliding window of a backbone, in tokens, the token itself included; None for no window."""
    config = backbone.config
    window: int | None = getattr(config, "sliding_window", None)
    has_none = config.model_type in ("llama", "gemma") or set(getattr(config, "layer_types", None) or ()) == {
        "full_attention"
    }
    return None if has_none else window  # some architectures ignore the field


def span_masks(packed: Pack, *, window: int | None = None) -> list[Tensor | None]:
    """Make the attention mask of every span: (queries, keys) bool, on the row's device.

    For whole sequences it is the mask of one of them; for suffixes the keys are the prefix and then the suffixes. It is
    None where causal or full attention, as `Span.causal` says, needs no mask. For a span with cached prefixes it is
    (sequences, 1, queries, keys), and the keys begin with the cached ones, padded to the longest.
    """
    positions = packed.positions[0]
    masks: list[Tensor | None] = []
    for span in packed.spans:
        queries = positions[span.start : span.stop]
        if span.prefix is None:
            queries = queries[: len(queries) // span.sequences]
            if not span.cached and (window is None or len(queries) <= window):
                masks.append(None)
                continue
            keys = queries
            mask = (keys <= queries[:, None]) | (not span.causal)
        else:
            suffix_lengths = torch.tensor(span.suffixes)
            suffix = torch.repeat_interleave(torch.arange(len(suffix_lengths)), suffix_lengths).to(positions.device)
            keys = torch.cat([positions[slice(*span.prefix)], queries])
            same_suffix = (suffix[:, None] == suffix) & (queries <= queries[:, None])
            prefix = same_suffix.new_ones(len(queries), span.prefix[1] - span.prefix[0])
            mask = torch.cat([prefix, same_suffix], 1)
        if window is not None:
            mask = mask & (keys > queries[:, None] - window) & (keys < queries[:, None] + window)
        if span.cached:
            mask = torch.cat([_cached_mask(positions, span, window), mask.expand(span.sequences, 1, *mask.shape)], -1)
        masks.append(mask)
    return masks


def _cached_mask(positions: Tensor, span: Span, window: int | None) -> Tensor:
    """Make the mask of a span's cached keys: (sequences, 1, queries, keys) bool."""
    queries = positions[span.start : span.stop].view(span.sequences, 1, -1, 1)
    lengths = queries[:, :, :1] if span.prefix is None else positions[span.prefix[0]].view(1, 1, 1, 1)
    keys = torch.arange(int(lengths.max()), device=positions.device)
    mask = (keys < lengths).expand(-1, -1, queries.shape[2], -1)
    return mask if window is None else mask & (keys > queries - window)


def packed_attention(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: None,
    *,
    spans: Sequence[Span],
    masks: Sequence[Tensor | None],
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend_spans` with the signature of transformers' attention functions; returns (1, tokens, heads, width)."""
    return attend_spans(query, _select(spans, key, value), spans, masks, scaling)[None], None


def _select(spans: Sequence[Span], key: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((span.select_keys(key), span.select_keys(value)) for span in spans)


def attend_spans(
    query: Tensor,
    selected: Iterable[tuple[Tensor, Tensor]],
    spans: Sequence[Span],
    masks: Sequence[Tensor | None],
    scaling: float | None,
) -> Tensor:
    """Attention of all tokens of a packed row, with shapes as in `RowAttention`.

    `selected` are the keys and values of each span, as `Span.select_keys` returns them; masks are those of
    `span_masks`.
    """
    outputs = []
    for span, mask, (keys, values) in zip(spans, masks, selected, strict=True):
        queries = span.unpack(query[:, :, span.start : span.stop])
        causal = span.causal and mask is None
        output = attend(queries, keys, values, mask, scaling, is_causal=causal)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Grouped-query attention; arguments have the shape that `Span.unpack` returns, and so has the result.

    The mask may be on another device, if the layers are on several.
    """
    mask = None if mask is None else mask.to(query.device)
    if query.requires_grad and query.device.type == "cpu" and query.shape[2] * key.shape[2] <= PLAIN_SCORES:
        return _attend_plainly(query, key, value, mask, scaling, is_causal=is_causal)
    if mask is not None and query.device.type == "cuda":  # its fast kernels take a mask only without grouped queries
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scaling, enable_gqa=True
    )


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    is_causal: bool,
) -> Tensor:
    """Unfused attention: on a CPU its backward pass takes a third of the fused kernel's time."""
    (sequences, _, tokens, width), heads = query.shape, key.shape[1]
    if is_causal:
        mask = query.new_ones(tokens, key.shape[2], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):
        scaled = query * (width**-0.5 if scaling is None else scaling)
        scores = scaled.reshape(sequences, heads, -1, width) @ key.transpose(-1, -2)
        if mask is not None:
            additive = scores.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
            scores = (scores.view(sequences, heads, -1, *mask.shape) + additive).view(scores.shape)
        return (scores.softmax(-1) @ value).view(query.shape)


def register() -> None:
    """Register `packed_attention` with transformers as `PACKED_ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
