"""The last layer for the pooled tokens alone.

Only one hidden state of a sequence reaches the head. The layers below need every token, and so do the last one's
keys and values; its queries, its output projection and its MLP are needed where a sequence ends, and nowhere else.
For a base cut to 16 layers that is a sixteenth of the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from mistral_rerank.local.packing import attend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.packing import Pack


def is_known(backbone: Any) -> bool:
    """Tell whether a backbone is a Mistral's or a Llama's: all layers alike, attention without extras."""
    return all(type(layer) in (MistralDecoderLayer, LlamaDecoderLayer) for layer in backbone.layers)


class LastLayer:
    """Takes the last layer and the final norm out of a backbone, whose output is then what the layer is given.

    Args:
        backbone: one that `is_known`; it is changed.

    """

    def __init__(self, backbone: Any) -> None:
        self._rotary = backbone.rotary_emb
        self._layer, self._norm = backbone.layers[-1], backbone.norm
        backbone.layers = backbone.layers[:-1]
        backbone.norm = nn.Identity()

    def __call__(self, hidden: Tensor, packed: Pack, masks: Sequence[Tensor | None]) -> Tensor:
        """Finish the forward of one row.

        Args:
            hidden: (1, tokens, hidden), the output of the layers below.
            packed: the row, on the same device.
            masks: what `span_masks` says of it.

        Returns:
            (members, hidden): the final hidden state of each sequence's last token.

        """
        layer, attention, last = self._layer, self._layer.self_attn, packed.last
        normed = layer.input_layernorm(hidden)
        cosines, sines = self._rotary(hidden, packed.positions)
        query = _heads(attention.q_proj(normed[:, last]), attention.head_dim)
        key = _heads(attention.k_proj(normed), attention.head_dim)
        value = _heads(attention.v_proj(normed), attention.head_dim)
        query, _ = apply_rotary_pos_emb(query, query, cosines[:, last], sines[:, last])
        key, _ = apply_rotary_pos_emb(key, key, cosines, sines)
        mixed = _attend(query, key, value, packed, masks, attention.scaling)
        states = hidden[:, last] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        finished: Tensor = self._norm(states)[0]
        return finished


def _heads(states: Tensor, width: int) -> Tensor:
    """Split (1, tokens, heads x width) into (1, heads, tokens, width)."""
    return states.view(*states.shape[:-1], -1, width).transpose(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, packed: Pack, masks: Sequence[Tensor | None], scaling: float
) -> Tensor:
    """Let each sequence's last token look at what it sees: (1, heads, members, width)."""
    places = packed.last.tolist()
    outputs, done = [], 0
    for span, mask in zip(packed.spans, masks, strict=True):
        ends = [place - span.start for place in places[done:] if place < span.stop]
        if not ends:
            continue  # a prefix: no sequence ends in it
        seen = None if mask is None else mask[ends]
        outputs.append(attend(query[:, :, done : done + len(ends)], span.seen(key), span.seen(value), seen, scaling))
        done += len(ends)
    return torch.cat(outputs, 2)
