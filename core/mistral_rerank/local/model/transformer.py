"""The forward of a row without padding, for inference: transformers' Mistral and Llama, with less around the sums.

Large intermediate results lie in memory that all layers of a forward share; a CPU would otherwise spend much of its
time on fresh pages. What the layers add up is float32, whatever the weights are, so that sixteen layers do not round
one sum again and again. And only one hidden state of a sequence reaches the head: the layers below the last one need
every token, and so do its keys and values; its queries, its output projection and its MLP are needed where a sequence
ends, and nowhere else. For a base cut to 16 layers that is a sixteenth of the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from mistral_rerank.local.batching.packing import sequence_means
from mistral_rerank.local.model.attention import SpanAttention
from mistral_rerank.local.model.int8 import ActivationQuantizer
from mistral_rerank.local.model.quantization import store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.batching.packing import Pack
    from mistral_rerank.local.model.attention import RowAttention
    from mistral_rerank.local.model.quantization import Linear
    from mistral_rerank.reranker import Quantization


def is_known(backbone: Any) -> bool:
    """Tell whether a backbone is a Mistral's or a Llama's: all layers alike, attention without extras."""
    kinds = {type(layer) for layer in getattr(backbone, "layers", ())}
    return len(kinds) == 1 and kinds <= {MistralDecoderLayer, LlamaDecoderLayer}


def window_of(backbone: Any) -> int | None:
    """Give the most positions that a token looks back, itself included; None for all."""
    window: int | None = getattr(backbone.config, "sliding_window", None)
    return None if backbone.config.model_type == "llama" else window  # a Llama takes no notice of the field


class PackedBackbone:
    """A backbone for rows without padding.

    Args:
        backbone: one that `is_known`. Its layers are taken out of it and moved one by one, so that weights that are
            stored anew are not held twice, and all of them whole never on the device.
        device: where to run.
        quantization: how the linears are stored; None for as they are.
        attention: what computes it.

    """

    def __init__(
        self,
        backbone: Any,
        device: torch.device,
        quantization: Quantization | None = None,
        attention: type[RowAttention] = SpanAttention,
    ) -> None:
        self._embed, self._rotary = backbone.embed_tokens.to(device), backbone.rotary_emb.to(device)
        self._norm = _Norm(backbone.norm.to(device))
        self._window, self._attention = window_of(backbone), attention
        self._inner: int = backbone.config.intermediate_size
        self._layers: list[_Layer] = []
        while backbone.layers:
            self._layers.append(_Layer(backbone.layers.pop(0).to(device), quantization))
        if quantization is not None:
            # the file that the weights are mapped from stays mapped as long as one of them is
            for parameter in backbone.parameters():
                parameter.data = parameter.data.clone()

    def __call__(
        self,
        packed: Pack,
        *,
        mean: bool = False,
        partial_states: Sequence[tuple[Tensor, Tensor]] = (),
        layer: int = 0,
    ) -> Tensor:
        """Run one row.

        Args:
            packed: the row, on the CPU.
            mean: whether all hidden states of a sequence are pooled, and not the last one.
            partial_states: positions in the row, int64, with the hidden states that `states` returned for them; for
                all sequences, or empty.
            layer: after which layer that was.

        Returns:
            (members, hidden): the pooled final hidden state of each sequence.

        """
        hidden, row, packed = self._run(packed, range(layer, len(self._layers) - (not mean)), partial_states)
        if mean:
            return sequence_means(self._norm(hidden, row), packed)[: len(packed.members)]
        return self._norm(self._layers[-1].last_tokens(hidden, row), row)

    def states(self, packed: Pack, layers: int) -> Tensor:
        """Run one row through the first layers: (tokens, hidden) float32, with the tokens that fill the row up."""
        return self._run(packed, range(layers), ())[0]

    def _run(
        self, packed: Pack, layers: range, partial_states: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, _Row, Pack]:
        """Fill a row up and run it through some layers."""
        packed, device = packed.padded_to_bucket(), self._embed.weight.device
        attention = self._attention(packed, self._window, device)
        packed = packed.to(device)
        embedded: Tensor = self._embed(packed.ids)[0]
        row = _Row(packed.last, attention, self._rotary(embedded, packed.positions), embedded, self._inner)
        hidden = embedded.float()
        for places, states in partial_states:
            hidden[places] = states
        for layer in self._layers[layers.start : layers.stop]:
            hidden = layer(hidden, row)
        return hidden, row, packed


class _Row:
    """What the layers of a forward share: the row, and memory for one result after another.

    Attributes:
        last: (members,) int64, where each member has its last token.
        attention: of the row.
        cos: (tokens, 1, width of a head), of the rotary embedding.
        sin: likewise.
        buffer: (tokens, hidden) float32, for a product on the way.
        normed: (tokens, hidden).
        output: (tokens, hidden), like the next two of linears that are not in 8 bits.
        gate: (tokens, inner).
        up: (tokens, inner).
        quantizer: of the inputs of linears in 8 bits.

    """

    def __init__(
        self, last: Tensor, attention: RowAttention, turns: tuple[Tensor, Tensor], hidden: Tensor, inner: int
    ) -> None:
        self.last, self.attention = last, attention
        self.cos, self.sin = turns[0][0, :, None], turns[1][0, :, None]
        self.buffer = torch.empty_like(hidden, dtype=torch.float32)
        self.normed, self.output = torch.empty_like(hidden), torch.empty_like(hidden)
        self.gate, self.up = hidden.new_empty(len(hidden), inner), hidden.new_empty(len(hidden), inner)
        self.quantizer = ActivationQuantizer()


class _Norm:
    """Root mean square normalization of tokens, in float32."""

    def __init__(self, norm: Any) -> None:
        self._weight, self._epsilon = norm.weight.detach().float(), norm.variance_epsilon

    def __call__(self, hidden: Tensor, row: _Row) -> Tensor:
        """Give (tokens, hidden) in the row's memory, of the weights' dtype; `hidden` is float32."""
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = (length.square() / hidden.shape[-1] + self._epsilon).rsqrt_()
        buffer = torch.mul(hidden, scale, out=row.buffer[: len(hidden)]).mul_(self._weight)
        return row.normed[: len(hidden)].copy_(buffer)


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, quantization: Quantization | None) -> None:
        def linear(module: Any, name: str) -> Linear:
            return store(getattr(module, name), quantization)

        attention, mlp = layer.self_attn, layer.mlp
        self._width, self._scaling = attention.head_dim, attention.scaling
        in_place = isinstance(mlp.act_fn, (SiLUActivation, nn.SiLU))
        self._activation = nn.SiLU(inplace=True) if in_place else mlp.act_fn
        self._before, self._between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._query, self._key = linear(attention, "q_proj"), linear(attention, "k_proj")
        self._value, self._output = linear(attention, "v_proj"), linear(attention, "o_proj")
        self._gate, self._up, self._down = linear(mlp, "gate_proj"), linear(mlp, "up_proj"), linear(mlp, "down_proj")

    def __call__(self, hidden: Tensor, row: _Row) -> Tensor:
        """Run all tokens.

        Args:
            hidden: (tokens, hidden) float32, what the layers below give; it is overwritten.
            row: where they come from.

        Returns:
            (tokens, hidden).

        """
        normed = self._before(hidden, row)
        query = self._apply_rotary(self._query(normed, row.quantizer), row.cos, row.sin)
        key, value = self._keys(normed, row)
        mixed = row.attention.all_tokens(query, key, value, self._scaling)
        return self._finish(hidden, mixed.flatten(1), row)

    def last_tokens(self, hidden: Tensor, row: _Row) -> Tensor:
        """Run the last token of each sequence, which looks at all others: (members, hidden)."""
        last, normed = row.last, self._before(hidden, row)
        query = self._apply_rotary(self._query(normed[last], row.quantizer), row.cos[last], row.sin[last])
        key, value = self._keys(normed, row)
        mixed = row.attention.last_tokens(query, key, value, self._scaling)
        return self._finish(hidden[last], mixed.flatten(1), row)

    def _keys(self, normed: Tensor, row: _Row) -> tuple[Tensor, Tensor]:
        """Give keys and values: (1, key heads, tokens, width)."""
        key, value = self._key(normed, row.quantizer), self._value(normed, row.quantizer)
        return self._apply_rotary(key, row.cos, row.sin), self._heads(value).transpose(0, 1)[None]

    def _heads(self, states: Tensor) -> Tensor:
        """Split (tokens, heads x width) into (tokens, heads, width)."""
        return states.view(len(states), -1, self._width)

    def _apply_rotary(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the rotary embedding to (tokens, heads x width): (1, heads, tokens, width)."""
        heads, half = self._heads(states), self._width // 2
        turned = heads * cos
        turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
        return turned.transpose(0, 1)[None]

    def _finish(self, hidden: Tensor, mixed: Tensor, row: _Row) -> Tensor:
        """Add the attention's output, (tokens, heads x width), to `hidden`, and then that of the MLP."""
        output, gate, up = row.output[: len(hidden)], row.gate[: len(hidden)], row.up[: len(hidden)]
        hidden.add_(self._output(mixed, row.quantizer, output))
        normed = self._between(hidden, row)
        gated: Tensor = self._activation(self._gate(normed, row.quantizer, gate))
        gated.mul_(self._up(normed, row.quantizer, up))
        return hidden.add_(self._down(gated, row.quantizer, output))
