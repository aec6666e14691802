"""How much memory a training run will take, from the shape of its base; nothing is loaded.

Counted are the weights, what LoRA adds (weights, gradients and both of Adam's moments, in float32) and what a forward
keeps for the backward. Not counted is what the libraries themselves take, about a gigabyte on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BYTES_OF_TRAINED = 16
"""Of a trained number: itself, its gradient and two moments, in float32."""
FOUR_BITS = 4.127 / 8
"""Bytes of a weight in NF4 with double quantization: 4 bits and its share of the scales."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a run at its peak.

    Attributes:
        weights: the frozen base, without its vocabulary head.
        trained: LoRA matrices and head, with gradients and moments.
        activations: what the groups of one forward keep for the backward.

    """

    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.trained + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "LoRA with Adam": self.trained, "activations": self.activations}
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"about {self.total / 2**30:.1f} GiB: {listed}"


def estimate(
    config: PretrainedConfig,
    *,
    layers: int | None,
    adapted_layers: int,
    lora_rank: int,
    tokens: int,
    bytes_of_weight: int,
    activation_checkpointing: bool,
    four_bit: bool = False,
) -> Memory:
    """Estimate a run's memory.

    Args:
        config: of the base; a Mistral's, a Llama's or one with the same fields.
        layers: how many of its layers are used; None for all.
        adapted_layers: how many of them, the highest, have LoRA; those below keep nothing for the backward.
        lora_rank: of all seven linears.
        tokens: that the groups of one forward have at most, what pairs share counted once.
        bytes_of_weight: 2 in bfloat16, 4 in float32.
        activation_checkpointing: whether a layer keeps its input alone and is computed again in the backward.
        four_bit: whether the layers' linears are kept in 4 bits (NF4 with scales in 8 bits, arXiv 2305.14314).

    """
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    used = layers or config.num_hidden_layers
    linears = [(queries, width), (keys, width), (keys, width), (width, queries)]
    linears += [(inner, width), (inner, width), (width, inner)]
    of_layers = used * sum(outputs * inputs for outputs, inputs in linears)
    weights = bytes_of_weight * vocabulary * width + (FOUR_BITS if four_bit else bytes_of_weight) * of_layers
    trained = width + adapted_layers * lora_rank * sum(outputs + inputs for outputs, inputs in linears)
    kept = bytes_of_weight * _kept_numbers(width, inner, queries, keys, lora_rank)
    layer_input = bytes_of_weight * width
    per_token = adapted_layers * layer_input + kept if activation_checkpointing else adapted_layers * kept
    return Memory(round(weights), BYTES_OF_TRAINED * trained, tokens * per_token)


def _kept_numbers(width: int, inner: int, queries: int, keys: int, rank: int) -> int:
    """Count the numbers that one layer keeps of a token, those in float32 as two.

    Two norms keep their input and their normed value in float32, and give one more to the linears; attention keeps
    queries and keys before and after their rotation, values and its output; the gated MLP keeps four of its width.
    """
    norms = 2 * (2 + 2 + 1) * width
    attention = 3 * queries + 3 * keys
    return norms + attention + 4 * inner + 7 * rank
