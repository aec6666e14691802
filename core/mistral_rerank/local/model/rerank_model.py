"""The forward pass: token ids in, one logit per sequence out.

There are two paths with equal scores. Mistral and Llama run on packed rows: a batch is one row without padding, and
shared prefixes are computed once (`batching.packing`). This path is used on a CPU, and on CUDA if flash attention
passes its self-check. All other models run on rows of similar length, padded on the right. A causal model never looks
ahead, so padding does not change the real tokens, and no attention mask is passed.

The hidden state of the last real token is gathered by length, never by comparing ids with a pad id. The head is
applied in float32. A checkpoint may set bidirectional attention, or mean pooling of all hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.batching.packing import (
    bucket_capacity,
    group_by_prefix,
    pack,
    packed_cost,
    plan_packs,
    sequence_segments,
)
from mistral_rerank.local.batching.padding import PaddedCost, plan_batches
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.flash_attention import FlashAttention, passes_self_check
from mistral_rerank.local.model.pooling import LAST_TOKEN, PoolingConfig
from mistral_rerank.local.model.rotary import forget_lengths, same_frequencies
from mistral_rerank.local.model.transformer import PackedBackbone, is_known, window_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.local.batching.packing import Pack, PackedCost
    from mistral_rerank.local.model.attention import RowAttention
    from mistral_rerank.local.model.early_exit import EarlyExit
    from mistral_rerank.reranker import Quantization

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class PartialStates:
    """A sequence that was read as far as a layer.

    Attributes:
        states: (tokens, hidden) float32, after it.
        layer: how many layers that are.

    """

    states: torch.Tensor
    layer: int


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give ids (rows, longest) padded with zeros on the right, and lengths (rows,); both int64 on the CPU."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths


def pooled_logits(
    backbone: nn.Module,
    head: nn.Module,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    reading: PoolingConfig = LAST_TOKEN,
) -> torch.Tensor:
    """Run the backbone and the binary head on right-padded rows.

    Args:
        backbone: a causal transformers model without its vocabulary head.
        head: maps (rows, hidden) float32 to (rows, 1).
        ids: (rows, longest) int64; what stands after a row's length does not matter.
        lengths: (rows,) int64, at least 1 each.
        reading: how the model reads a row.

    Returns:
        (rows,) float32.

    """
    mask = _both_ways(lengths, window_of(backbone)) if reading.bidirectional else None
    hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    if not reading.mean:
        return apply_head(head, hidden[torch.arange(len(ids), device=ids.device), lengths - 1])
    real = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])[:, :, None]
    return apply_head(head, hidden.float().masked_fill(~real, 0.0).sum(1) / lengths[:, None])


def _both_ways(lengths: torch.Tensor, window: int | None) -> torch.Tensor:
    """Say which keys each token sees: all that are real, within the window; (rows, 1, longest, longest) bool."""
    places = torch.arange(int(lengths.max()), device=lengths.device)
    near = (places[:, None] - places).abs() < (window or len(places))
    seen = near & (places < lengths[:, None, None])
    own = torch.eye(len(places), dtype=torch.bool, device=lengths.device)  # padding has to see something
    return (seen | own)[:, None]


def apply_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Map pooled states (rows, hidden) to logits (rows,) in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits: torch.Tensor = head(hidden.float()).squeeze(-1)
    return logits


def row_attention(backbone: Any, device: torch.device) -> type[RowAttention] | None:
    """Choose what computes attention in rows without padding; None where batches are padded instead."""
    if not is_known(backbone):
        return None
    if device.type == "cuda":
        attention, heads = backbone.layers[0].self_attn, backbone.config.num_attention_heads
        shape = heads, backbone.config.num_key_value_heads, attention.head_dim
        return FlashAttention if passes_self_check(*shape, device, attention.q_proj.weight.dtype) else None
    return SpanAttention if device.type == "cpu" else None


class RerankModel:
    """A backbone and its head on one device, for inference only.

    Args:
        backbone: a causal transformers model without its vocabulary head; it is taken over.
        head: maps (rows, hidden) to (rows, 1).
        device: where to run; both are moved there.
        reading: how it reads a sequence.
        packed: whether batches have no padding; None: where `row_attention` knows how.
        quantization: of a backbone for batches without padding.
        estimates: whether `states` and `estimates` will be asked for, which need batches without padding.

    Raises:
        CheckpointError: the quantization, or what gives estimates, is not for this architecture.

    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        device: torch.device,
        *,
        reading: PoolingConfig = LAST_TOKEN,
        packed: bool | None = None,
        quantization: Quantization | None = None,
        estimates: bool = False,
    ) -> None:
        self._backbone = backbone.eval().requires_grad_(False)
        forget_lengths(backbone)
        self._head = head.float().to(device).eval().requires_grad_(False)
        self._device = device
        self._pooling = reading
        self._packed: PackedBackbone | None = None
        attention = row_attention(backbone, device) if packed is None else SpanAttention if packed else None
        if attention is None and (quantization is not None or estimates) and is_known(backbone):
            attention = SpanAttention  # a call for each sequence: slower, and on every device
        if attention is not None:
            self._packed = PackedBackbone(backbone, device, quantization, attention)
        elif estimates:
            raise CheckpointError("a cascade and its early exit need a Mistral or a Llama; this is another model")
        elif quantization is not None:
            raise CheckpointError(
                f"quantization {quantization!r} is for rows without padding of a Mistral or a Llama; leave it out"
            )
        else:
            self._backbone.to(device)

    def plan(self, sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
        """Say which sequences share a forward of at most `budget` computed tokens: lists of positions."""
        if self._packed:
            rows = plan_packs(sequences, bucket_capacity(budget), share=self._pooling.shares)
            return [[member for group in groups for member in group.members] for groups in rows]
        return plan_batches([len(sequence) for sequence in sequences], budget)

    def cost(self, sequences: Sequence[Sequence[int]]) -> PackedCost | PaddedCost:
        """Say how many tokens a forward of these sequences computes."""
        if self._packed:
            return packed_cost(sequences, share=self._pooling.shares)
        return PaddedCost(len(sequences), max(map(len, sequences)))

    def logits(self, sequences: Sequence[Sequence[int]], partial_states: Sequence[PartialStates] = ()) -> list[float]:
        """Score one batch, in input order.

        Args:
            sequences: token ids.
            partial_states: what `states` or `estimates` gave for each of them, to go on from; or nothing.

        Raises:
            MemoryError: the batch does not fit; what it had taken is free again.

        """
        return self._within_memory(lambda: self._forward(sequences, partial_states))

    def estimates(
        self, early_exit: EarlyExit, layer: int, sequences: Sequence[Sequence[int]], passages: Sequence[range]
    ) -> tuple[list[float], list[PartialStates]]:
        """Estimate the logits of one batch with the first layers alone, in input order.

        Args:
            early_exit: on the device.
            layer: how many layers it needs.
            sequences: token ids.
            passages: where in each of them the passage is.

        Returns:
            The estimates, and the sequences as far as they are read.

        Raises:
            CheckpointError: as in `states`.
            MemoryError: the batch does not fit; what it had taken is free again.

        """
        return self._within_memory(lambda: self._estimate(early_exit, layer, sequences, passages))

    @torch.inference_mode()
    def states(self, sequences: Sequence[Sequence[int]], layer: int) -> list[PartialStates]:
        """Run one batch through the first layers, in input order.

        Args:
            sequences: token ids.
            layer: how many layers, fewer than all.

        Raises:
            CheckpointError: the model was not made for estimates.

        """
        backbone = self._packed
        if backbone is None:
            raise CheckpointError("this model was not made for estimates")

        def run(members: Sequence[int]) -> list[PartialStates]:
            packed = self._pack([sequences[member] for member in members])
            row = backbone.states(packed, layer)
            return [PartialStates(row[places], layer) for places in self._places(packed)]

        return self._by_frequencies(sequences, run)

    @torch.inference_mode()
    def _within_memory(self, compute: Callable[[], Found]) -> Found:
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            message = str(error)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # what PyTorch's CPU allocator says
                raise
            message = str(error)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError(message)

    def _by_frequencies(
        self, sequences: Sequence[Sequence[int]], run: Callable[[Sequence[int]], list[Found]]
    ) -> list[Found]:
        """Run sequences of different rotary frequencies one after the other; `run` takes their positions."""
        found: dict[int, Found] = {}
        for members in same_frequencies(self._backbone.config, [len(sequence) for sequence in sequences]):
            found |= zip(members, run(members), strict=True)
        return [found[position] for position in range(len(sequences))]

    def _forward(self, sequences: Sequence[Sequence[int]], partial_states: Sequence[PartialStates]) -> list[float]:
        def run(members: Sequence[int]) -> list[float]:
            own = [sequences[member] for member in members]
            return self._forward_together(own, [partial_states[member] for member in members] if partial_states else ())

        return self._by_frequencies(sequences, run)

    def _forward_together(
        self, sequences: Sequence[Sequence[int]], partial_states: Sequence[PartialStates]
    ) -> list[float]:
        if self._packed is None:
            ids, lengths = pad(sequences)
            on_device = ids.to(self._device), lengths.to(self._device)
            return pooled_logits(self._backbone, self._head, *on_device, self._pooling).tolist()
        packed = self._pack(sequences)
        places, layer = (self._places(packed), partial_states[0].layer) if partial_states else ([], 0)
        parts = [(where, own.states) for where, own in zip(places, partial_states, strict=True)]
        pooled = self._packed(packed, mean=self._pooling.mean, partial_states=parts, layer=layer)
        found = apply_head(self._head, pooled).tolist()
        logits = dict(zip(packed.members, found, strict=True))
        return [logits[position] for position in range(len(sequences))]

    def _estimate(
        self, early_exit: EarlyExit, layer: int, sequences: Sequence[Sequence[int]], passages: Sequence[range]
    ) -> tuple[list[float], list[PartialStates]]:
        partial_states = self.states(sequences, layer)
        estimates: torch.Tensor = early_exit([own.states for own in partial_states], passages)
        return estimates.tolist(), partial_states

    def _pack(self, sequences: Sequence[Sequence[int]]) -> Pack:
        groups = group_by_prefix(sequences, share=self._pooling.shares)
        return pack(sequences, groups, causal=not self._pooling.bidirectional)

    def _places(self, packed: Pack) -> list[torch.Tensor]:
        """Say where in a row the tokens of each sequence are, int64, in input order."""
        places = dict(zip(packed.members, sequence_segments(packed), strict=True))
        return [
            torch.cat([torch.arange(part.start, part.stop) for part in places[position]]).to(self._device)
            for position in range(len(places))
        ]
