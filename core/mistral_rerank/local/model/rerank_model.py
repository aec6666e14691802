"""The reranking model: token ids in, one logit for each sequence out.

There are two forwards with equal scores:

- Mistral, Llama, Qwen2, Qwen3 and Gemma run on packed rows, on a CPU, and on CUDA if flash attention passes its
  self-check. A batch is one row without padding, and shared prefixes are computed once.
- All other models run on rows of similar length that are padded on the right. Causal attention never reaches the
  padding, so decoders get no attention mask; encoders get one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.batching.packing import bucket_capacity, pack, sequence_segments
from mistral_rerank.local.batching.planning import PaddedCost, packed_cost, plan_packs, plan_padded
from mistral_rerank.local.batching.prefix_groups import group_by_prefix
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.flash_attention import FlashAttention, passes_self_check
from mistral_rerank.local.model.pooling import (
    LAST_TOKEN,
    PoolingConfig,
    apply_head,
    encoder_logits,
    is_encoder,
    pooled_logits,
)
from mistral_rerank.local.model.rotary import forget_lengths, same_frequencies
from mistral_rerank.local.model.transformer import KNOWN_NAMES, PackedBackbone, is_known

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mistral_rerank.local.batching.packing import Pack
    from mistral_rerank.local.batching.planning import PackedCost
    from mistral_rerank.local.model.attention import RowAttention
    from mistral_rerank.local.model.early_exit import EarlyExit
    from mistral_rerank.reranker import Quantization

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PartialStates:
    """The hidden states of a sequence after a lower layer, from which a forward can resume.

    Attributes:
        states: (tokens, hidden) float32.
        layer: number of layers that have run.

    """

    states: torch.Tensor
    layer: int


def pad(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences with zeros on the right: ids (rows, longest) and lengths (rows,), int64 on the CPU."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return ids, lengths


def row_attention(backbone: Any, device: torch.device) -> type[RowAttention] | None:
    """Choose the attention implementation for packed rows; None if batches are padded instead."""
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
        backbone: a transformers model without its head; an encoder may be a classifier. It is moved and changed.
        head: maps (rows, hidden) to (rows, 1); None for a classifier.
        device: where to run.
        pooling: pooling and attention of the model.
        separator: as in `encoder_logits`.
        packed: whether batches are packed rows; None to let `row_attention` decide.
        quantization: of the linears; needs packed rows.
        resumable: whether `states`, `estimates` and resuming are needed; they need packed rows.

    Raises:
        CheckpointError: packed rows are needed, and the architecture is none of `KNOWN_NAMES`.

    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | None,
        device: torch.device,
        *,
        pooling: PoolingConfig = LAST_TOKEN,
        separator: int | None = None,
        packed: bool | None = None,
        quantization: Quantization | None = None,
        resumable: bool = False,
    ) -> None:
        self._backbone = backbone.eval().requires_grad_(False)
        forget_lengths(backbone)
        self._head = None if head is None else head.float().to(device).eval().requires_grad_(False)
        self._encoder, self._separator = is_encoder(backbone), separator
        self._device = device
        self._pooling = pooling
        self._packed: PackedBackbone | None = None
        attention = row_attention(backbone, device) if packed is None else SpanAttention if packed else None
        if attention is None and (quantization is not None or resumable) and is_known(backbone):
            attention = SpanAttention  # slower than padded batches, but it works on every device
        if attention is not None:
            self._packed = PackedBackbone(backbone, device, quantization, attention)
        elif resumable:
            raise CheckpointError(f"a cascade and its early exit need a {KNOWN_NAMES}; this is another model")
        elif quantization is not None:
            raise CheckpointError(
                f"quantization {quantization!r} is for rows without padding of a {KNOWN_NAMES}; leave it out"
            )
        else:
            self._backbone.to(device)

    def plan(self, sequences: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
        """Put sequences into batches of at most `budget` computed tokens: lists of positions."""
        if self._packed:
            rows = plan_packs(sequences, bucket_capacity(budget), share=self._pooling.shares)
            return [[member for group in groups for member in group.members] for groups in rows]
        return plan_padded([len(sequence) for sequence in sequences], budget)

    def cost(self, sequences: Sequence[Sequence[int]]) -> PackedCost | PaddedCost:
        """Count the tokens that a batch of these sequences computes."""
        if self._packed:
            return packed_cost(sequences, share=self._pooling.shares)
        return PaddedCost(len(sequences), max(map(len, sequences)))

    def logits(self, sequences: Sequence[Sequence[int]], partial_states: Sequence[PartialStates] = ()) -> list[float]:
        """Score one batch, in input order.

        Args:
            sequences: token ids.
            partial_states: of each sequence, from `states` or `estimates`, to resume from; empty to run all layers.

        Raises:
            MemoryError: the batch does not fit into memory; what it had allocated is freed.

        """
        return self._within_memory(lambda: self._logits(sequences, partial_states))

    def estimates(
        self, early_exit: EarlyExit, layer: int, sequences: Sequence[Sequence[int]], passages: Sequence[range]
    ) -> tuple[list[float], list[PartialStates]]:
        """Estimate the logits of one batch with an early exit, in input order.

        Args:
            early_exit: on the device.
            layer: number of layers below the early exit.
            sequences: token ids.
            passages: the passage's tokens in each sequence.

        Returns:
            The estimates and the partial hidden states.

        Raises:
            CheckpointError: as in `states`.
            MemoryError: as in `logits`.

        """

        def compute() -> tuple[list[float], list[PartialStates]]:
            partial_states = self.states(sequences, layer)
            estimates: torch.Tensor = early_exit([partial.states for partial in partial_states], passages)
            return estimates.tolist(), partial_states

        return self._within_memory(compute)

    @torch.inference_mode()
    def states(self, sequences: Sequence[Sequence[int]], layer: int) -> list[PartialStates]:
        """Run one batch through the first layers, in input order.

        Args:
            sequences: token ids.
            layer: number of layers, fewer than all.

        Raises:
            CheckpointError: the model is not `resumable`.

        """
        backbone = self._packed
        if backbone is None:
            raise CheckpointError("this model was not loaded for an early exit")

        def run(members: Sequence[int]) -> list[PartialStates]:
            packed = self._pack([sequences[member] for member in members])
            hidden = backbone.states(packed, layer)
            return [PartialStates(hidden[indices], layer) for indices in self._token_indices(packed)]

        return self._by_frequencies(sequences, run)

    @torch.inference_mode()
    def _within_memory(self, compute: Callable[[], Result]) -> Result:
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            message = str(error)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # the message of PyTorch's CPU allocator
                raise
            message = str(error)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise MemoryError(message)

    def _by_frequencies(
        self, sequences: Sequence[Sequence[int]], run: Callable[[Sequence[int]], list[Result]]
    ) -> list[Result]:
        """Call `run` with the positions of sequences with the same rotary frequencies; results in input order."""
        results: dict[int, Result] = {}
        for members in same_frequencies(self._backbone.config, [len(sequence) for sequence in sequences]):
            results |= zip(members, run(members), strict=True)
        return [results[position] for position in range(len(sequences))]

    def _logits(self, sequences: Sequence[Sequence[int]], partial_states: Sequence[PartialStates]) -> list[float]:
        def run(members: Sequence[int]) -> list[float]:
            partial = [partial_states[member] for member in members] if partial_states else []
            return self._forward([sequences[member] for member in members], partial)

        return self._by_frequencies(sequences, run)

    def _forward(self, sequences: Sequence[Sequence[int]], partial_states: Sequence[PartialStates]) -> list[float]:
        """Score sequences with the same rotary frequencies."""
        if self._packed is None:
            ids, lengths = pad(sequences)
            on_device = ids.to(self._device), lengths.to(self._device)
            if self._encoder:
                arguments = self._pooling, self._separator
                return encoder_logits(self._backbone, self._head, *on_device, *arguments).tolist()
            return pooled_logits(self._backbone, self._head, *on_device, self._pooling).tolist()
        packed = self._pack(sequences)
        indices, layer = (self._token_indices(packed), partial_states[0].layer) if partial_states else ([], 0)
        resumed = [(where, partial.states) for where, partial in zip(indices, partial_states, strict=True)]
        pooled = self._packed(packed, mean=self._pooling.mean, partial_states=resumed, layer=layer)
        logits = dict(zip(packed.members, apply_head(self._head, pooled).tolist(), strict=True))
        return [logits[position] for position in range(len(sequences))]

    def _pack(self, sequences: Sequence[Sequence[int]]) -> Pack:
        groups = group_by_prefix(sequences, share=self._pooling.shares)
        return pack(sequences, groups, causal=not self._pooling.bidirectional)

    def _token_indices(self, packed: Pack) -> list[torch.Tensor]:
        """Return the indices of each sequence's tokens in a row, int64, in input order."""
        members = dict(zip(packed.members, sequence_segments(packed), strict=True))
        return [
            torch.cat([torch.arange(part.start, part.stop) for part in members[position]]).to(self._device)
            for position in range(len(members))
        ]
