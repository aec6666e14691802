"""Estimate of a training run's memory from the shape of its base; nothing is loaded.

It counts the weights, the LoRA parameters with gradients and Adam's moments in float32, and the activations that are
saved for the backward pass. The libraries need about a gigabyte more on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.local.model.transformer import linear_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TRAINED_BYTES = 16
"""Bytes per trained parameter: weight, gradient and two moments in float32."""
NF4_BYTES = 4.127 / 8
"""Bytes per weight in NF4 with double quantization, with its share of the scales (arXiv 2305.14314)."""


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
    config: PreTrainedConfig,
    *,
    adapted_layers: int,
    lora_rank: int,
    tokens: int,
    weight_bytes: int,
    activation_checkpointing: bool,
    four_bit: bool = False,
) -> Memory:
    """Estimate a run's memory.

    Args:
        config: of the base, a Mistral or a Llama with the layers that are used.
        adapted_layers: number of layers with LoRA, the highest ones. Layers below save nothing for the backward pass.
        lora_rank: of all seven linears.
        tokens: maximum of one forward pass, shared prefixes counted once.
        weight_bytes: 2 in bfloat16, 4 in float32.
        activation_checkpointing: whether layers save only their input and recompute the rest in the backward pass.
        four_bit: whether the layers' linears are in NF4 with double quantization.

    """
    width, inner = config.hidden_size, config.intermediate_size
    linears = linear_shapes(config)
    (queries, _), (keys, _) = linears[:2]
    layer_weights = sum(outputs * inputs for outputs, inputs in linears)
    weights = weight_bytes * config.vocab_size * width
    weights += round((NF4_BYTES if four_bit else weight_bytes) * config.num_hidden_layers * layer_weights)
    trained = width + adapted_layers * lora_rank * sum(outputs + inputs for outputs, inputs in linears)
    # Each of two norms saves its input and its normed value in float32, and its output. Attention saves queries and
    # keys before and after the rotary embedding, values and its output. The gated MLP saves four of its width.
    layer_numbers = 2 * (2 + 2 + 1) * width + 3 * queries + 3 * keys + 4 * inner + 7 * lora_rank
    numbers = adapted_layers * width + layer_numbers if activation_checkpointing else adapted_layers * layer_numbers
    return Memory(weights, TRAINED_BYTES * trained, tokens * weight_bytes * numbers)
