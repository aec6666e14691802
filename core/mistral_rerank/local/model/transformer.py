"""The transformer for inference on packed rows: decoders of transformers of the Llama kind, with less overhead.

- All layers write large intermediate results into the same buffers. On a CPU, fresh memory costs much of the time.
- The residual stream is float32 whatever the dtype of the weights, so 16 layers do not add up rounding errors.
- Only one hidden state of each sequence reaches the head. The last layer needs keys and values of all tokens, but
  queries, output projection and MLP of the last tokens only. In a model of 16 layers that saves 1/16 of the work.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mistral_rerank.local.batching.planning import bucket_capacity, bucket_length
from mistral_rerank.local.model.attention import SpanAttention, window_of
from mistral_rerank.local.model.cached_prefixes import CachedAttention, CachedPrefix
from mistral_rerank.local.model.decoder import Decoder
from mistral_rerank.local.model.key_values import ChunkAttention, KeyValues
from mistral_rerank.local.model.placement import layer_devices
from mistral_rerank.local.model.pooling import sequence_means
from mistral_rerank.local.model.quantization import ActivationQuantizer, quantize
from mistral_rerank.local.model.rotary import apply_rotary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig

    from mistral_rerank.local.batching.packing import Pack
    from mistral_rerank.local.model.attention import RowAttention
    from mistral_rerank.local.model.cached_prefixes import RowPrefixes
    from mistral_rerank.local.model.quantization import Linear
    from mistral_rerank.reranker import Quantization


KNOWN_LAYERS = {
    name: f"transformers.models.{name}.modeling_{name}.{name.capitalize()}DecoderLayer"
    for name in ("mistral", "llama", "qwen2", "qwen3", "gemma")
}
"""The layers that run on packed rows, by the model type in config.json. As names, because the import of transformers'
models takes longer than that of PyTorch."""
KNOWN_NAMES = "Mistral, Llama, Qwen2, Qwen3 or Gemma"


def is_known(backbone: Any) -> bool:
    """Tell whether all layers of a backbone are plain layers of one of `KNOWN_NAMES`, with the same window."""
    if isinstance(backbone, Decoder):
        return True
    types = {type(layer) for layer in getattr(backbone, "layers", ())}
    names = {f"{layer.__module__}.{layer.__qualname__}" for layer in types}
    windows = set(getattr(backbone.config, "layer_types", None) or ())
    return len(types) == 1 and names <= set(KNOWN_LAYERS.values()) and len(windows) <= 1


def linear_shapes(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Give (outputs, inputs) of a layer's linears: queries, keys, values, output, and the three of the MLP."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    queries, keys = head * heads, head * (getattr(config, "num_key_value_heads", None) or heads)
    attention = [(queries, width), (keys, width), (keys, width), (width, queries)]
    return [*attention, (inner, width), (inner, width), (width, inner)]


def key_value_bytes(config: PreTrainedConfig, number_bytes: int) -> int:
    """Give the bytes of a token's keys and values in all layers."""
    layers: int = config.num_hidden_layers
    return 2 * linear_shapes(config)[1][0] * layers * number_bytes


class PackedBackbone:
    """A backbone for packed rows, made of one that `is_known`.

    That one loses its layers: each is moved and quantized before the next, so the device never holds all unquantized
    weights. With `further_devices` the layers are placed as in `placement`.

    Attributes:
        key_value_bytes: bytes that `KeyValues` takes for a token.

    """

    def __init__(
        self,
        backbone: Any,
        device: torch.device,
        quantization: Quantization | None = None,
        attention: type[RowAttention] = SpanAttention,
        further_devices: Sequence[torch.device] = (),
    ) -> None:
        self._embed, self._rotary = backbone.embed_tokens.to(device), backbone.rotary_emb.to(device)
        self._norm = _Norm(backbone.norm.to(device))
        self._window, self._attention = window_of(backbone), attention
        self._intermediate_size: int = backbone.config.intermediate_size
        shapes = linear_shapes(backbone.config)
        self._score_cost = 2 * shapes[0][0] / sum(outputs * inputs for outputs, inputs in shapes)
        self._head_width: int = backbone.layers[0].self_attn.head_dim
        self._key_heads = shapes[1][0] // self._head_width
        self.key_value_bytes = key_value_bytes(backbone.config, backbone.embed_tokens.weight.element_size())
        self._layers: list[_Layer] = []
        for layer_device in layer_devices(len(backbone.layers), [device, *further_devices]):
            self._layers.append(_Layer(backbone.layers.pop(0).to(layer_device), quantization))
        if quantization is not None:
            # one parameter that is a part of larger memory, such as a mapped file, would keep all of it
            for parameter in backbone.parameters():
                parameter.data = parameter.data.clone()

    def __call__(
        self,
        packed: Pack,
        *,
        mean: bool = False,
        partial_states: Sequence[tuple[Tensor, Tensor]] = (),
        layer: int = 0,
        prefixes: RowPrefixes | None = None,
    ) -> Tensor:
        """Run one row.

        Args:
            packed: the row, on the CPU.
            mean: whether to pool the mean of all hidden states; otherwise the last token's.
            partial_states: to resume all sequences after `layer`: token indices in the row, int64, and their hidden
                states there. Empty to run all layers.
            layer: the layer after which to resume.
            prefixes: cached ones, of all layers; None for none.

        Returns:
            (members, hidden): the pooled final hidden state of each sequence.

        """
        layers = range(layer, len(self._layers) - (not mean))
        hidden, row, packed = self._run(packed, layers, partial_states, prefixes)
        if mean:
            return sequence_means(self._norm(hidden, row), packed)[: len(packed.last)]
        return self._last_tokens(hidden, row)

    def states(self, packed: Pack, layers: int) -> Tensor:
        """Run one row through the first layers: (tokens, hidden) float32, with the padding to a bucket."""
        return self._run(packed, range(layers), ())[0]

    def new_prefix(self, tokens: int) -> CachedPrefix:
        """Allocate a cached prefix."""
        shape = len(self._layers), tokens, self._key_heads, self._head_width
        keys, values = (self._embed.weight.new_empty(shape) for _ in range(2))
        return CachedPrefix(keys, values)

    def begin(self, length: int, *, cached: CachedPrefix | None = None, keeps_all: bool = False) -> KeyValues:
        """Begin a sequence of so many tokens, of which `extend` runs the first ones that are not cached."""
        embedded = self._embed(torch.zeros(1, 1, dtype=torch.int64, device=self._embed.weight.device))
        cos, sin = self._rotary(embedded, torch.arange(length, device=embedded.device)[None])
        return KeyValues(len(self._layers), self._window, cos, sin, cached=cached, keeps_all=keeps_all)

    def chunk_length(self, start: int, tokens: int) -> int:
        """Return the length of a chunk from `start` that costs about as much as the first `tokens` of a sequence."""
        return bucket_capacity(max(8, int(tokens / (1 + self._score_cost * start))))

    def extend(self, kept: KeyValues, ids: Sequence[int]) -> Tensor:
        """Run the next tokens of a causal sequence, after those in `kept`, and add theirs.

        Returns:
            (1, hidden): the final hidden state of the last of them.

        """
        length = bucket_length(len(ids))
        row_ids = torch.tensor([*ids, *[0] * (length - len(ids))]).to(self._embed.weight.device)
        last = torch.tensor([len(ids) - 1]).to(row_ids.device)
        embedded: Tensor = self._embed(row_ids[None])[0]
        attention = ChunkAttention(kept, length, last)
        row = _Row(last, attention, kept.rotary(length), embedded, self._intermediate_size)
        hidden = embedded.float()
        for layer in self._layers[:-1]:
            hidden, row = _on(layer.device, hidden, row)
            hidden = layer(hidden, row)
        output = self._last_tokens(hidden, row)
        kept.tokens += len(ids)
        return output

    def _run(
        self,
        packed: Pack,
        layers: range,
        partial_states: Sequence[tuple[Tensor, Tensor]],
        prefixes: RowPrefixes | None = None,
    ) -> tuple[Tensor, _Row, Pack]:
        """Pad a row to a bucket and run it through a range of layers."""
        packed, device = packed.padded_to_bucket(), self._embed.weight.device
        attention = (
            self._attention(packed, self._window, device)
            if prefixes is None
            else CachedAttention(packed, self._window, device, prefixes)
        )
        packed = packed.to(device)
        embedded: Tensor = self._embed(packed.ids)[0]
        row = _Row(packed.last, attention, self._rotary(embedded, packed.positions), embedded, self._intermediate_size)
        hidden = embedded.float()
        for indices, states in partial_states:
            hidden[indices] = states
        for layer in self._layers[layers.start : layers.stop]:
            hidden, row = _on(layer.device, hidden, row)
            hidden = layer(hidden, row)
        return *_on(device, hidden, row), packed

    def _last_tokens(self, hidden: Tensor, row: _Row) -> Tensor:
        """Run the last layer and the final norm for the last tokens: (members, hidden)."""
        layer, device = self._layers[-1], self._embed.weight.device
        hidden, row = _on(layer.device, hidden, row)
        return self._norm(*_on(device, layer.last_tokens(hidden, row), row))


def _on(device: torch.device, hidden: Tensor, row: _Row) -> tuple[Tensor, _Row]:
    """Move the state of a forward to a layer's device, if it is on another."""
    return (hidden, row) if hidden.device == device else (hidden.to(device), row.to(device))


class _Row:
    """What the layers of a forward share: the row, and buffers for intermediate results.

    Attributes:
        last: (members,) int64, index of each member's last token.
        attention: of the row.
        cos: (tokens, 1, head width), of the rotary embedding.
        sin: likewise.
        buffer: (tokens, hidden) float32.
        normed: (tokens, hidden).
        output: (tokens, hidden); it and the next two are not used by int8 linears.
        gate: (tokens, intermediate size).
        up: (tokens, intermediate size).
        quantizer: of the inputs of int8 linears.

    """

    def __init__(
        self,
        last: Tensor,
        attention: RowAttention,
        rotary: tuple[Tensor, Tensor],
        hidden: Tensor,
        intermediate_size: int,
    ) -> None:
        self.last, self.attention = last, attention
        self.cos, self.sin = rotary[0][0, :, None], rotary[1][0, :, None]
        self.buffer = torch.empty_like(hidden, dtype=torch.float32)
        self.normed, self.output = torch.empty_like(hidden), torch.empty_like(hidden)
        self.gate, self.up = (hidden.new_empty(len(hidden), intermediate_size) for _ in range(2))
        self.quantizer = ActivationQuantizer()

    def to(self, device: torch.device) -> _Row:
        """Copy the row to another device, with buffers of its own."""
        row = copy(self)
        row.last, row.cos, row.sin = (tensor.to(device) for tensor in (self.last, self.cos, self.sin))
        for name in ("buffer", "normed", "output", "gate", "up"):
            setattr(row, name, torch.empty_like(getattr(self, name), device=device))
        return row


class _Norm:
    """RMSNorm, computed in float32."""

    def __init__(self, norm: Any) -> None:
        is_gemma = type(norm).__name__ == "GemmaRMSNorm"
        self._weight = norm.weight.detach().float() + (1.0 if is_gemma else 0.0)
        self._epsilon = norm.eps if is_gemma else norm.variance_epsilon

    def __call__(self, hidden: Tensor, row: _Row) -> Tensor:
        """Normalize (tokens, hidden) float32 into the row's buffer, in the dtype of the weights."""
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = (norm.square() / hidden.shape[-1] + self._epsilon).rsqrt_()
        buffer = torch.mul(hidden, scale, out=row.buffer[: len(hidden)]).mul_(self._weight)
        return row.normed[: len(hidden)].copy_(buffer)


class _Layer:
    """One decoder layer, on its device."""

    def __init__(self, layer: Any, quantization: Quantization | None) -> None:
        self.device = layer.input_layernorm.weight.device  # with its index

        def linear(module: Any, name: str) -> Linear:
            return quantize(getattr(module, name), quantization)

        attention, mlp = layer.self_attn, layer.mlp
        self._width, self._scaling = attention.head_dim, attention.scaling
        in_place = type(mlp.act_fn).__name__ in ("SiLUActivation", "SiLU")
        self._activation = nn.SiLU(inplace=True) if in_place else mlp.act_fn
        self._input_norm, self._mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._query_norm, self._key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self._query, self._key = linear(attention, "q_proj"), linear(attention, "k_proj")
        self._value, self._output = linear(attention, "v_proj"), linear(attention, "o_proj")
        self._gate, self._up, self._down = linear(mlp, "gate_proj"), linear(mlp, "up_proj"), linear(mlp, "down_proj")

    def __call__(self, hidden: Tensor, row: _Row) -> Tensor:
        """Run all tokens: (tokens, hidden) float32, the output of the layer below, is overwritten."""
        normed = self._input_norm(hidden, row)
        query = self._rotate(self._query(normed, row.quantizer), self._query_norm, row.cos, row.sin)
        key, value = self._keys_and_values(normed, row)
        attended = row.attention.all_tokens(query, key, value, self._scaling)
        return self._add_residuals(hidden, attended.flatten(1), row)

    def last_tokens(self, hidden: Tensor, row: _Row) -> Tensor:
        """Run the last token of each sequence, which attends to the others: (members, hidden)."""
        last, normed = row.last, self._input_norm(hidden, row)
        query = self._query(normed[last], row.quantizer)
        query = self._rotate(query, self._query_norm, row.cos[last], row.sin[last])
        key, value = self._keys_and_values(normed, row)
        attended = row.attention.last_tokens(query, key, value, self._scaling)
        return self._add_residuals(hidden[last], attended.flatten(1), row)

    def _keys_and_values(self, normed: Tensor, row: _Row) -> tuple[Tensor, Tensor]:
        """Compute keys and values of all tokens: (1, key heads, tokens, width)."""
        key, value = self._key(normed, row.quantizer), self._value(normed, row.quantizer)
        return self._rotate(key, self._key_norm, row.cos, row.sin), self._heads(value).transpose(0, 1)[None]

    def _heads(self, states: Tensor) -> Tensor:
        """Reshape (tokens, heads x width) to (tokens, heads, width)."""
        return states.view(len(states), -1, self._width)

    def _rotate(self, states: Tensor, norm: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalize (tokens, heads x width), if there is a norm, and apply the rotary embedding.

        Returns:
            (1, heads, tokens, width).

        """
        heads = self._heads(states)
        if norm is not None:
            heads = nn.functional.rms_norm(heads, (self._width,), norm.weight, norm.variance_epsilon)
        return apply_rotary(heads, cos, sin).transpose(0, 1)[None]

    def _add_residuals(self, hidden: Tensor, attended: Tensor, row: _Row) -> Tensor:
        """Add the projection of the attention's output (tokens, heads x width) to `hidden`, then the MLP's output."""
        output, gate, up = row.output[: len(hidden)], row.gate[: len(hidden)], row.up[: len(hidden)]
        hidden.add_(self._output(attended, row.quantizer, output))
        normed = self._mlp_norm(hidden, row)
        gated: Tensor = self._activation(self._gate(normed, row.quantizer, gate))
        gated.mul_(self._up(normed, row.quantizer, up))
        return hidden.add_(self._down(gated, row.quantizer, output))
