"""The reranking model: a batch of token ids in, one logit for each sequence out, in the batch's order.

There are two forwards with equal scores:

- Mistral, Llama, Qwen2, Qwen3 and Gemma run on packed rows on a CPU, and on CUDA if flash attention passes its
  self-check. A batch is one row without padding, and shared prefixes are computed once.
- All other models run on rows of similar length that are padded on the right. Causal attention never reaches the
  padding, so decoders get no attention mask; encoders get one.
"""

from __future__ import annotations

import functools
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.batching.packing import copy_to, pack, sequence_segments
from mistral_rerank.local.batching.planning import bucket_capacity, plan_by_frequencies, plan_packed, plan_padded
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.cached_prefixes import CachedPrefix, RowPrefixes
from mistral_rerank.local.model.flash_attention import FlashAttention, passes_self_check
from mistral_rerank.local.model.placement import place
from mistral_rerank.local.model.pooling import (
    LAST_TOKEN,
    PoolingConfig,
    apply_head,
    encoder_logits,
    is_encoder,
    pooled_logits,
)
from mistral_rerank.local.model.rotary import depends_on_length, forget_lengths, same_frequencies
from mistral_rerank.local.model.transformer import KNOWN_NAMES, PackedBackbone, is_known

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mistral_rerank.local.batching.packing import Pack
    from mistral_rerank.local.batching.planning import Batch
    from mistral_rerank.local.model.attention import RowAttention
    from mistral_rerank.local.model.early_exit import EarlyExit
    from mistral_rerank.local.model.key_values import KeyValues
    from mistral_rerank.local.model.lora import ActiveAdapter
    from mistral_rerank.reranker import Quantization

WIDTH_ON_CUDA = 8
"""The width of a decoder's padded rows is a multiple of it.

In float32 on an H200 (PyTorch 2.11), the last of 129 tokens got a wrong score under a sliding window; rows with padding
after that token were right.
"""

Arguments = ParamSpec("Arguments")
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


def pad(sequences: Sequence[Sequence[int]], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences with zeros on the right: ids (rows, width) and lengths (rows,), int64 on the CPU.

    The width is the longest length, rounded up to a multiple.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = -(-int(lengths.max()) // multiple) * multiple
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
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
        return FlashAttention if passes_self_check(*shape, device, backbone.embed_tokens.weight.dtype) else None
    return SpanAttention if device.type == "cpu" else None


def runs_packed(backbone: Any, device: torch.device) -> bool:
    """Tell whether batches are packed rows, which need of a backbone its parameters only, and no forward."""
    return row_attention(backbone, device) is not None


def _on_device(head: nn.Module, device: torch.device) -> nn.Module:
    return head.float().to(device).eval().requires_grad_(False)


def _within_memory(
    forward: Callable[Concatenate[RerankModel, Arguments], Result],
) -> Callable[Concatenate[RerankModel, Arguments], Result]:
    """Run a method in inference mode; if memory runs out, free what it had allocated and raise MemoryError."""

    @functools.wraps(forward)
    def run(self: RerankModel, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if self._active is not None:
            self._active.name = self._adapter
        try:
            with torch.inference_mode():
                return forward(self, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            message = str(error)
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # the message of PyTorch's CPU allocator
                raise
            message = str(error)
        if self._device.type == "cuda":  # outside the except clause, where the error still references tensors
            torch.cuda.empty_cache()
        raise MemoryError(message)

    return run


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
        active: of a backbone with several adapters; see `with_adapter`.
        further_devices: share a decoder's layers with `device`, as in `placement`.

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
        active: ActiveAdapter | None = None,
        further_devices: Sequence[torch.device] = (),
    ) -> None:
        self._active = active
        self._adapter: str | None = None
        self._backbone = backbone.eval().requires_grad_(False)
        forget_lengths(backbone)
        self._head: Any = None if head is None else _on_device(head, device)
        self._encoder, self._separator = is_encoder(backbone), separator
        self._device = device
        self._pooling = pooling
        self._packed: PackedBackbone | None = None
        by_length = depends_on_length(backbone.config)
        self._caches_prefixes = device.type == "cpu" and not by_length
        self._width = WIDTH_ON_CUDA if device.type == "cuda" and not (self._encoder or by_length) else 1
        attention = row_attention(backbone, device) if packed is None else SpanAttention if packed else None
        if attention is None and (quantization is not None or resumable) and is_known(backbone):
            attention = SpanAttention  # slower than padded batches, but it works on every device
        if attention is not None:
            self._packed = PackedBackbone(backbone, device, quantization, attention, further_devices)
        elif resumable:
            raise CheckpointError(f"a cascade and its early exit need a {KNOWN_NAMES}; this is another model")
        elif quantization is not None:
            raise CheckpointError(
                f"quantization {quantization!r} is for rows without padding of a {KNOWN_NAMES}; leave it out"
            )
        else:
            place(backbone, [device, *further_devices])

    def with_adapter(self, name: str, head: nn.Module, pooling: PoolingConfig) -> RerankModel:
        """Make the model of an adapter, which shares the backbone. One of them may run at a time."""
        model = copy(self)
        model._adapter, model._head, model._pooling = name, _on_device(head, self._device), pooling
        return model

    def plan(self, sequences: Sequence[Sequence[int]], budget: int, cached: Sequence[int] = ()) -> list[Batch]:
        """Put sequences into batches of at most `budget` computed tokens.

        `cached` are the lengths of their cached prefixes, of a model with `prefix_bytes`.
        """
        if any(cached):
            return plan_packed(sequences, bucket_capacity(budget), cached=cached)

        def plan(same: Sequence[Sequence[int]]) -> list[Batch]:
            if self._packed is None:
                return plan_padded(same, budget)
            return plan_packed(same, bucket_capacity(budget), share=self._pooling.shares)

        frequencies = same_frequencies(self._backbone.config, list(map(len, sequences)))
        return plan_by_frequencies(plan, sequences, frequencies)

    @_within_memory
    def logits(self, batch: Batch, partial_states: Sequence[PartialStates] = ()) -> list[float]:
        """Score one batch; with `partial_states` of each sequence, resume from them.

        Raises:
            MemoryError: the batch does not fit into memory; what it had allocated is freed.

        """
        logits: torch.Tensor
        if self._packed is None:
            ids, lengths = pad(batch.sequences, self._width)
            on_device = copy_to(self._device, ids), copy_to(self._device, lengths)
            if self._encoder:
                logits = encoder_logits(self._backbone, self._head, *on_device, self._pooling, self._separator)
            else:
                logits = pooled_logits(self._backbone, self._head, *on_device, self._pooling)
        else:
            packed = pack(batch, causal=not self._pooling.bidirectional)
            indices, layer = (self._token_indices(packed), partial_states[0].layer) if partial_states else ([], 0)
            resumed = [(where, partial.states) for where, partial in zip(indices, partial_states, strict=True)]
            pooled = self._packed(packed, mean=self._pooling.mean, partial_states=resumed, layer=layer)
            logits = apply_head(self._head, pooled)
        return logits.tolist()

    @property
    def key_value_bytes(self) -> int:
        """Bytes that `chunks` keeps for a token of a sequence; 0 for a model that computes sequences whole.

        Chunks need packed rows, causal attention and the pooling of the last token.
        """
        return self._packed.key_value_bytes if self._packed is not None and self._pooling.shares else 0

    @property
    def prefix_bytes(self) -> int:
        """Bytes of a cached prefix, for one token; 0 for a model without cached prefixes.

        They need what `chunks` needs, a CPU, and rotary frequencies that do not depend on the length of a sequence.
        """
        return self.key_value_bytes if self._caches_prefixes else 0

    @_within_memory
    def new_prefix(self, tokens: int) -> CachedPrefix:
        """Allocate a cached prefix, whose content is not set.

        Raises:
            CheckpointError: the model has no packed rows.
            MemoryError: it does not fit into memory.

        """
        if self._packed is None:
            raise CheckpointError("this model has no cached prefixes")
        return self._packed.new_prefix(tokens)

    @_within_memory
    def logits_with_prefixes(
        self, batch: Batch, cached: Sequence[CachedPrefix], new: Sequence[tuple[int, CachedPrefix]]
    ) -> list[float]:
        """Score one batch with cached prefixes.

        Args:
            batch: of `plan`.
            cached: the prefixes of its groups with cached tokens, in order.
            new: (sequence, prefix): the first keys and values of a sequence without cached tokens are copied into the
                prefix.

        Raises:
            CheckpointError: the model has no packed rows.
            MemoryError: as in `logits`.

        """
        if self._packed is None:
            raise CheckpointError("this model has no cached prefixes")
        pooled = self._packed(pack(batch), prefixes=RowPrefixes(cached, new))
        logits: list[float] = apply_head(self._head, pooled).tolist()
        return logits

    def chunks(
        self,
        sequence: Sequence[int],
        tokens: int,
        cached: CachedPrefix | None = None,
        new: CachedPrefix | None = None,
    ) -> Iterator[float | None]:
        """Score one sequence in chunks that cost as much as `tokens` tokens; the last one yields the logit.

        The other chunks yield None. Keys and values are kept between them, so the logit is that of `logits`.

        Args:
            sequence: token ids.
            tokens: of a chunk.
            cached: the sequence's cached prefix, if it has one.
            new: receives the sequence's first keys and values with the last chunk.

        Raises:
            CheckpointError: the model computes sequences whole.
            MemoryError: as in `logits`.

        """
        if self._packed is None:
            raise CheckpointError("this model computes a sequence whole")
        kept = self._begin(self._packed, len(sequence), cached, keeps_all=new is not None)
        while True:
            logit = self._extend(self._packed, kept, sequence, tokens, new)
            if kept.tokens == len(sequence):
                yield logit
                return
            yield None

    @_within_memory
    def _begin(
        self, backbone: PackedBackbone, length: int, cached: CachedPrefix | None, *, keeps_all: bool
    ) -> KeyValues:
        return backbone.begin(length, cached=cached, keeps_all=keeps_all)

    @_within_memory
    def _extend(
        self,
        backbone: PackedBackbone,
        kept: KeyValues,
        sequence: Sequence[int],
        tokens: int,
        new: CachedPrefix | None,
    ) -> float:
        stop = kept.tokens + backbone.chunk_length(kept.tokens, tokens)
        logit: float = apply_head(self._head, backbone.extend(kept, sequence[kept.tokens : stop])).item()
        if new is not None and kept.tokens == len(sequence):
            kept.copy_to(new)
        return logit

    @_within_memory
    def estimates(
        self, early_exit: EarlyExit, layer: int, batch: Batch, passages: Sequence[range]
    ) -> tuple[list[float], list[PartialStates]]:
        """Estimate the logits of one batch with an early exit after `layer` layers; also return the partial states.

        `passages` are the passage's tokens in each sequence.

        Raises:
            CheckpointError: as in `states`.
            MemoryError: as in `logits`.

        """
        partial_states = self.states(batch, layer)
        estimates: torch.Tensor = early_exit([partial.states for partial in partial_states], passages)
        return estimates.tolist(), partial_states

    @torch.inference_mode()
    def states(self, batch: Batch, layer: int) -> list[PartialStates]:
        """Run one batch through the first `layer` layers, fewer than all.

        Raises:
            CheckpointError: the model is not `resumable`.

        """
        if self._packed is None:
            raise CheckpointError("this model was not loaded for an early exit")
        packed = pack(batch, causal=not self._pooling.bidirectional)
        hidden = self._packed.states(packed, layer)
        return [PartialStates(hidden[indices], layer) for indices in self._token_indices(packed)]

    def _token_indices(self, packed: Pack) -> list[torch.Tensor]:
        """Return the indices of each sequence's tokens in a row, int64."""
        indices = [
            torch.cat([torch.arange(part.start, part.stop) for part in parts]) for parts in sequence_segments(packed)
        ]
        all_indices = copy_to(self._device, torch.cat(indices))
        return list(torch.split_with_sizes(all_indices, [len(part) for part in indices]))
