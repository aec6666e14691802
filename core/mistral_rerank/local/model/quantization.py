"""Quantization: the linears of a layer, unquantized, in int8 or in NF4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, get_args

import torch

from mistral_rerank.errors import SettingsError
from mistral_rerank.local.model.int8 import Int8Linear, multiplies_bytes
from mistral_rerank.local.model.nf4 import NF4Linear, import_bitsandbytes
from mistral_rerank.reranker import Quantization

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mistral_rerank.local.model.int8 import ActivationQuantizer


class Linear(Protocol):
    """A linear layer, quantized or not."""

    def __call__(self, states: Tensor, quantizer: ActivationQuantizer, out: Tensor | None = None, /) -> Tensor:
        """Map (tokens, inputs) to (tokens, outputs).

        Args:
            states: the inputs.
            quantizer: of the current forward.
            out: may be used for the result.

        """


class UnquantizedLinear:
    """A linear with its original weights."""

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.detach().T
        self._bias = None if linear.bias is None else linear.bias.detach()

    def __call__(self, states: Tensor, _: ActivationQuantizer, out: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        if self._bias is None:
            return torch.mm(states, self._weight, out=out)
        return torch.addmm(self._bias, states, self._weight, out=out)


def quantize(linear: nn.Linear, quantization: Quantization | None) -> Linear:
    """Quantize a linear on its device; None leaves it unquantized."""
    if quantization is None:
        return UnquantizedLinear(linear)
    return Int8Linear(linear) if quantization == "int8" else NF4Linear(linear)


def check_quantization(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a quantization works with a device and a dtype.

    Raises:
        SettingsError: it does not, or its name is unknown.
        MissingDependencyError: it needs an extra that is not installed.

    """
    if name is None:
        return
    if name not in get_args(Quantization):
        raise SettingsError(f"quantization {name!r} is not known; give 'int8' or 'nf4', or leave it out")
    if name == "nf4":
        if device.type not in ("cpu", "cuda"):
            raise SettingsError("quantization 'nf4' runs on a CPU or on CUDA, not here; leave it out")
        import_bitsandbytes()
        return
    if device.type != "cpu" or not multiplies_bytes():
        raise SettingsError("quantization 'int8' runs on a CPU with VNNI instructions, not here; leave it out")
    if dtype not in (torch.float32, torch.bfloat16):
        raise SettingsError("quantization 'int8' goes with dtype 'float32' or 'bfloat16'")
