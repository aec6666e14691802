"""NF4 linears: weights in 4 bits, in a quarter of the memory of bfloat16.

The format is QLoRA's (arXiv 2305.14314): 16 values, a scale for each block of 64 weights, and the scales in 8 bits.
Weights are dequantized for every product, which costs little when there are many tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mistral_rerank.errors import MissingDependencyError

if TYPE_CHECKING:
    from mistral_rerank.local.model.int8 import ActivationQuantizer


def import_bitsandbytes() -> Any:
    """Import bitsandbytes.

    Raises:
        MissingDependencyError: the extra `nf4` is not installed.

    """
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError.of("nf4", error) from error


class NF4Linear:
    """A linear with NF4 weights; the output has the dtype of the original weights.

    Args:
        linear: on the device where it will run; it can be freed afterwards.

    """

    def __init__(self, linear: nn.Linear) -> None:
        functional = import_bitsandbytes().functional
        self._dequantize = functional.dequantize_4bit
        self._weight, self._scales = functional.quantize_4bit(
            linear.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def __call__(self, states: torch.Tensor, _: ActivationQuantizer, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `quantization.Linear`."""
        weight = self._dequantize(self._weight, self._scales).T
        if self._bias is None:
            return torch.mm(states, weight, out=out)
        return torch.addmm(self._bias, states, weight, out=out)
