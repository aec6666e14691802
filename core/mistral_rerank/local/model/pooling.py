"""Pooling: from hidden states to one logit for each sequence.

The last token's state, or the mean of all, goes through the binary head in float32. `pooled_logits` is the forward of
padded rows with any model of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mistral_rerank.local.model.attention import window_of

if TYPE_CHECKING:
    from torch import nn

    from mistral_rerank.local.batching.packing import Pack


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """A checkpoint's pooling and attention.

    Attributes:
        bidirectional: whether attention is bidirectional; otherwise it is causal.
        mean: whether the mean of all hidden states is pooled.
        cls: whether the first token's hidden state is pooled; with neither, it is the last token's.

    """

    bidirectional: bool = False
    mean: bool = False
    cls: bool = False

    @property
    def shares(self) -> bool:
        """Whether sequences with a common prefix can share its hidden states."""
        return not (self.bidirectional or self.mean or self.cls)


LAST_TOKEN = PoolingConfig()
"""Causal attention and the last token, as in rerank-qa-mistral-4b."""


def pooled_logits(
    backbone: nn.Module,
    head: nn.Module,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    pooling: PoolingConfig = LAST_TOKEN,
) -> torch.Tensor:
    """Run the backbone and the binary head on right-padded rows.

    The last token is found by length, not by comparing ids with a padding id.

    Args:
        backbone: a causal transformers model without its vocabulary head.
        head: maps (rows, hidden) float32 to (rows, 1).
        ids: (rows, longest) int64; padding may be any id.
        lengths: (rows,) int64, at least 1 each.
        pooling: pooling and attention of the model.

    Returns:
        (rows,) float32.

    """
    mask = _bidirectional_mask(lengths, window_of(backbone)) if pooling.bidirectional else None
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return apply_head(head, _pool(hidden, lengths, pooling))


def is_encoder(backbone: nn.Module) -> bool:
    """Tell whether no attention of a model of transformers is causal."""
    return not any(getattr(module, "is_causal", False) for module in backbone.modules())


def encoder_logits(
    encoder: nn.Module,
    head: nn.Module | None,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    pooling: PoolingConfig,
    separator: int | None,
) -> torch.Tensor:
    """Run an encoder on right-padded rows, as `pooled_logits`.

    Args:
        encoder: a model that `is_encoder`; a classifier with one label if `head` is None.
        head: as in `pooled_logits`, or None.
        ids: as in `pooled_logits`, like the next two.
        lengths: of the rows.
        pooling: of the head.
        separator: id of the token between question and passage, if the encoder tells them apart by token types.

    Returns:
        (rows,) float32.

    """
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    if separator is not None:
        separators = ids == separator
        inputs["token_type_ids"] = (((separators.cumsum(1) - separators.long()) > 0) & real).long()
    output = encoder(**inputs)
    if head is None:
        logits: torch.Tensor = output.logits[:, 0].float()
        return logits
    return apply_head(head, _pool(output.last_hidden_state, lengths, pooling))


def _pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: PoolingConfig) -> torch.Tensor:
    """Pool (rows, longest, hidden) to (rows, hidden)."""
    if pooling.cls:
        return hidden[:, 0]
    if not pooling.mean:
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    real = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])[:, :, None]
    return hidden.float().masked_fill(~real, 0.0).sum(1) / lengths[:, None]


def _bidirectional_mask(lengths: torch.Tensor, window: int | None) -> torch.Tensor:
    """Make the mask of bidirectional attention without padding: (rows, 1, longest, longest) bool."""
    positions = torch.arange(int(lengths.max()), device=lengths.device)
    in_window = (positions[:, None] - positions).abs() < (window or len(positions))
    mask = in_window & (positions < lengths[:, None, None])
    diagonal = torch.eye(len(positions), dtype=torch.bool, device=lengths.device)  # a softmax needs at least one key
    return (mask | diagonal)[:, None]


def sequence_means(hidden: torch.Tensor, packed: Pack) -> torch.Tensor:
    """Average states (tokens, hidden) over each sequence of a row without prefixes: (members, hidden) float32."""
    spans = ((span, hidden[span.start : span.stop]) for span in packed.spans)
    return torch.cat([states.view(span.sequences, -1, states.shape[-1]).float().mean(1) for span, states in spans])


def apply_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Map pooled states (rows, hidden) to logits (rows,) in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits: torch.Tensor = head(hidden.float()).squeeze(-1)
    return logits
