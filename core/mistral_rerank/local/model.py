"""The forward pass: token ids in, one logit a sequence out.

Two ways, the same scores. On a CPU a batch is one row of tokens without padding, with shared prefixes computed
once (`packing`). On other devices, and for architectures other than Mistral's and Llama's, it is rows of similar
length padded on the right: a causal model never looks ahead, so every real token is computed as if the padding were
not there, and no attention mask is passed.

Either way the last real token's hidden state is gathered by length (never by comparing ids with a pad id), and
the head alone is applied, in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from mistral_rerank.local.last_layer import LastLayer, is_known
from mistral_rerank.local.packing import (
    PACKED_ATTENTION,
    pack,
    packed_cost,
    plan_packs,
    register,
    share_prefixes,
    span_masks,
)
from mistral_rerank.local.plan import PaddedCost, plan_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.packing import Pack, PackedCost


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
    return _apply(head, last)


def packed_logits(
    backbone: nn.Module, head: nn.Module, packed: Pack, last_layer: LastLayer | None = None
) -> torch.Tensor:
    """Run the backbone and the binary head on one row of sequences without padding.

    Args:
        backbone: as for `pooled_logits`, with `PACKED_ATTENTION` as its attention.
        head: maps (rows, hidden) float32 to (rows, 1).
        packed: the row, on any device.
        last_layer: what was taken out of the backbone, if it was.

    Returns:
        (members,) float32.

    """
    packed = packed.to(next(backbone.parameters()).device)
    masks = span_masks(packed, window=getattr(backbone.config, "sliding_window", None))
    hidden = backbone(
        input_ids=packed.ids,
        position_ids=packed.positions,
        attention_mask=None,
        use_cache=False,
        spans=packed.spans,
        masks=masks,
    ).last_hidden_state
    return _apply(head, hidden[0, packed.last] if last_layer is None else last_layer(hidden, packed, masks))


def _apply(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits: torch.Tensor = head(hidden.float()).squeeze(-1)
    return logits


class RerankModel:
    """A backbone and its head on one device, for inference only.

    Args:
        backbone: a causal transformers model without its vocabulary head, on `device`.
        head: maps (rows, hidden) to (rows, 1), on `device`.
        device: where to run.
        packed: whether batches have no padding; None: on a CPU, for architectures that are known here.

    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, device: torch.device, *, packed: bool | None = None
    ) -> None:
        self._backbone = backbone.eval().requires_grad_(False)
        self._head = head.float().eval().requires_grad_(False)
        self._device = device
        self._packed = (device.type == "cpu" and is_known(backbone)) if packed is None else packed
        if self._packed:
            register()
            backbone.set_attn_implementation(PACKED_ATTENTION)  # type: ignore[operator]
        self._last_layer = LastLayer(backbone) if self._packed else None

    def plan(self, sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
        """Say which sequences share a forward of at most `budget` computed tokens: lists of positions."""
        if self._packed:
            rows = plan_packs(sequences, budget)
            return [[member for tree in trees for member in tree.members] for trees in rows]
        return plan_batches([len(sequence) for sequence in sequences], budget)

    def cost(self, sequences: Sequence[Sequence[int]]) -> PackedCost | PaddedCost:
        """Say how many tokens a forward of these sequences computes."""
        return packed_cost(sequences) if self._packed else PaddedCost(len(sequences), max(map(len, sequences)))

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Score one batch, in input order.

        Raises:
            MemoryError: the batch does not fit; what it had taken is free again.

        """
        try:
            return self._forward(sequences)
        except torch.OutOfMemoryError as error:
            message = str(error)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # what PyTorch's CPU allocator says
                raise
            message = str(error)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError(message)

    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        if not self._packed:
            ids, lengths = pad(sequences)
            return pooled_logits(self._backbone, self._head, ids.to(self._device), lengths.to(self._device)).tolist()
        packed = pack(sequences, share_prefixes(sequences))
        found = packed_logits(self._backbone, self._head, packed, self._last_layer).tolist()
        logits = dict(zip(packed.members, found, strict=True))
        return [logits[position] for position in range(len(sequences))]
