"""Quantization: the linears of a layer, unquantized, in int8 or in NF4.

int8 is for a CPU, whose VNNI instructions multiply bytes twice as fast as bfloat16. Weights are quantized once, with a
scale for each output; activations on the fly, with a scale for each token.

NF4 is the format of QLoRA (arXiv 2305.14314), in a quarter of the memory of bfloat16: 16 values, a scale for each block
of 64 weights, and the scales in 8 bits. Weights are dequantized for every product, which costs little when there are
many tokens.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.local.model.lora import AdaptedLinear
from mistral_rerank.reranker import Quantization

QMAX = 127
"""The largest magnitude of a token, or of a row of weights, is quantized to this."""
ZERO_POINT = 128
"""The unsigned byte that represents zero: adding 128 to a signed byte flips its sign bit. oneDNN needs unsigned inputs
for its fast kernels."""


class Linear(Protocol):
    """A linear layer, quantized or not."""

    def __call__(self, states: Tensor, quantizer: ActivationQuantizer, out: Tensor | None = None, /) -> Tensor:
        """Map (tokens, inputs) to (tokens, outputs); `out` may be used for the result."""


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


class SharedLinear:
    """A linear that several adapters share: its weights are merged with the active adapter's for every product."""

    def __init__(self, linear: AdaptedLinear) -> None:
        self._linear = linear

    def __call__(self, states: Tensor, _: ActivationQuantizer, out: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        weight, bias = self._linear.merged().T, self._linear.bias
        return torch.mm(states, weight, out=out) if bias is None else torch.addmm(bias, states, weight, out=out)


class ActivationQuantizer:
    """Quantizes the inputs of linears; `q_proj`, `k_proj` and `v_proj` have the same input and share the result.

    The result is valid until the next call with another input.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._quantized: tuple[Tensor, Tensor]
        self._allocate(0)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize (tokens, inputs): unsigned bytes, and each token's absolute maximum (tokens, 1) as `states`."""
        if states is not self._last:
            absmax = _absmax(states).clamp_min(torch.finfo(states.dtype).tiny * QMAX)
            if self._bytes.numel() < states.numel():
                self._allocate(states.numel())
            scaled, signed = (buffer[: states.numel()].view(states.shape) for buffer in (self._scaled, self._bytes))
            signed.copy_(torch.mul(states, QMAX / absmax.float(), out=scaled).round_())
            self._last, self._quantized = states, (signed.view(torch.uint8).bitwise_xor_(ZERO_POINT), absmax)
        return self._quantized

    def _allocate(self, numbers: int) -> None:
        self._scaled = torch.empty(numbers, dtype=torch.float32)  # whatever the default dtype is at the moment
        self._bytes = torch.empty(numbers, dtype=torch.int8)


def _absmax(states: Tensor) -> Tensor:
    """Return each token's absolute maximum, (tokens, 1).

    Without their sign bits, floats are in the same order as the integers of the same bits.
    """
    integer = {2: torch.int16, 4: torch.int32}[states.itemsize]
    return states.view(integer).bitwise_and(torch.iinfo(integer).max).amax(-1, keepdim=True).view(states.dtype)


class Int8Linear:
    """A linear with int8 weights and activations; the output has the dtype of the original weights."""

    def __init__(self, linear: nn.Linear) -> None:
        self._dtype = linear.weight.dtype
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * QMAX) / QMAX
        quantized = (weight / scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._scales, self._zero_points = scales, torch.zeros(len(scales), dtype=torch.int64)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def __call__(self, states: Tensor, quantizer: ActivationQuantizer, _out: Tensor | None = None) -> Tensor:
        """Map (tokens, inputs) to (tokens, outputs), in new memory."""
        quantized, absmax = quantizer(states)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized,
            1 / QMAX,
            ZERO_POINT,
            self._weight,
            self._scales,
            self._zero_points,
            None,  # the bias is added after the scale of each token
            1.0,
            0,
            self._dtype,
            "none",
            [],
            "",
        )
        products.mul_(absmax)
        return products if self._bias is None else products.add_(self._bias)


class NF4Linear:
    """A linear with NF4 weights; the output has the dtype of the original weights."""

    def __init__(self, linear: nn.Linear) -> None:
        functional = import_bitsandbytes().functional
        self._dequantize = functional.dequantize_4bit
        self._weight, self._scales = functional.quantize_4bit(
            linear.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def __call__(self, states: Tensor, _: ActivationQuantizer, out: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        weight = self._dequantize(self._weight, self._scales).T
        if self._bias is None:
            return torch.mm(states, weight, out=out)
        return torch.addmm(self._bias, states, weight, out=out)


def quantize(linear: nn.Linear | AdaptedLinear, quantization: Quantization | None) -> Linear:
    """Quantize a linear on its device; None leaves it unquantized. One that adapters share is never quantized."""
    if isinstance(linear, AdaptedLinear):
        return SharedLinear(linear)
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


def multiplies_bytes() -> bool:
    """Tell whether the CPU has instructions for products of bytes; without them, sums of products can overflow."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def import_bitsandbytes() -> Any:
    """Import bitsandbytes; MissingDependencyError if the extra `nf4` is not installed."""
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError.of("nf4", error) from error
