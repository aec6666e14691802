"""The forward pass: token ids in, one logit a sequence out.

A causal model never looks ahead, so with padding on the right every real token is computed as if the padding
were not there. No attention mask is passed, the last real token's hidden state is gathered by length (never
by comparing ids with a pad id), and the head alone is applied, in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mistral_rerank.local.packing import span_masks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.packing import Pack


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give ids (rows, longest) padded with zeros on the right, and lengths (rows,); both int64 on the CPU."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths


def pooled_logits(backbone: nn.Module, head: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Run the backbone and the binary head on right-padded rows.

    Args:
        backbone: a causal transformers model without its vocabulary head.
        head: maps (rows, hidden) float32 to (rows, 1).
        ids: (rows, longest) int64; what stands after a row's length does not matter.
        lengths: (rows,) int64, at least 1 each.

    Returns:
        (rows,) float32.

    """
    hidden = backbone(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
    with torch.autocast(ids.device.type, enabled=False):
        logits: torch.Tensor = head(last.float()).squeeze(-1)
    return logits


def packed_logits(backbone: nn.Module, head: nn.Module, packed: Pack) -> torch.Tensor:
    """Run the backbone and the binary head on one row of sequences without padding.

    Args:
        backbone: as for `pooled_logits`, with `PACKED_ATTENTION` as its attention.
        head: maps (rows, hidden) float32 to (rows, 1).
        packed: the row, on any device.

    Returns:
        (members,) float32.

    """
    packed = packed.to(next(backbone.parameters()).device)
    hidden = backbone(
        input_ids=packed.ids,
        position_ids=packed.positions,
        attention_mask=None,
        use_cache=False,
        spans=packed.spans,
        masks=span_masks(packed, window=getattr(backbone.config, "sliding_window", None)),
    ).last_hidden_state[0]
    with torch.autocast(hidden.device.type, enabled=False):
        logits: torch.Tensor = head(hidden[packed.last].float()).squeeze(-1)
    return logits


class RerankModel:
    """A backbone and its head on one device, for inference only."""

    def __init__(self, backbone: nn.Module, head: nn.Module, device: torch.device) -> None:
        self._backbone = backbone.eval().requires_grad_(False)
        self._head = head.float().eval().requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Score one batch.

        Raises:
            MemoryError: the batch does not fit; what it had taken is free again.

        """
        ids, lengths = pad(sequences)
        try:
            return pooled_logits(self._backbone, self._head, ids.to(self._device), lengths.to(self._device)).tolist()
        except torch.OutOfMemoryError as error:
            message = str(error)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # what PyTorch's CPU allocator says
                raise
            message = str(error)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError(message)
