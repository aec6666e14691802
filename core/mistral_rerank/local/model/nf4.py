"""Linears whose weights are kept in 4 bits, in a quarter of the memory of bfloat16.

The format is QLoRA's (arXiv 2305.14314): the 16 values of NF4, a scale for each 64 weights, and the scales in 8 bits.
Each product widens its weights again, which costs little where there are many tokens.
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
    """Import the library.

    Raises:
        MissingDependencyError: the extra `nf4` is not installed.

    """
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError.of("nf4", error) from error


class NF4Linear:
    """A linear with weights in 4 bits, whose output has the dtype that they had.

    Args:
        linear: on the device that it is to run on; it is not needed afterwards.

    """

    def __init__(self, linear: nn.Linear) -> None:
        functional = import_bitsandbytes().functional
        self._widen = functional.dequantize_4bit
        self._weight, self._scales = functional.quantize_4bit(
            linear.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def __call__(self, states: torch.Tensor, _: ActivationQuantizer, out: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply (tokens, inputs) to (tokens, outputs), which may lie in `out`."""
        weight = self._widen(self._weight, self._scales).T
        if self._bias is None:
            return torch.mm(states, weight, out=out)
        return torch.addmm(self._bias, states, weight, out=out)
