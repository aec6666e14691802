"""Estimate of a training run's memory from the shape of its base; nothing is loaded.

It counts the weights, the LoRA parameters with gradients and Adam's moments in float32, and the activations that are
saved for the backward pass. The libraries need about a gigabyte more on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BYTES_OF_TRAINED = 16
"""Bytes per trained parameter: weight, gradient and two moments in float32."""
FOUR_BITS = 4.127 / 8
"""Bytes per weight in NF4 with double quantization, with its share of the scales."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of a run, in bytes.

    Attributes:
        weights: of the frozen base, without its vocabulary head.
        trained: LoRA matrices and head, with gradients and moments.
        activations: of one forward pass, saved for the backward pass.

    """

    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
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
        config: of the base, with the fields of a Mistral or a Llama.
        layers: number of layers used; None for all.
        adapted_layers: number of layers with LoRA, the highest ones. Layers below save nothing for the backward pass.
        lora_rank: of all seven linears.
        tokens: maximum of one forward pass, shared prefixes counted once.
        bytes_of_weight: 2 in bfloat16, 4 in float32.
        activation_checkpointing: whether layers save only their input and recompute the rest in the backward pass.
        four_bit: whether the layers' linears are in 4 bits (NF4 with scales in 8 bits, arXiv 2305.14314).

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
    """Count the numbers that one layer saves per token, float32 ones as two.

    Each norm saves its input and its normed value in float32, and its output for the linears. Attention saves queries
    and keys before and after the rotary embedding, values and its output. The gated MLP saves four of its width.
    """
    norms = 2 * (2 + 2 + 1) * width
    attention = 3 * queries + 3 * keys
    return norms + attention + 4 * inner + 7 * rank
