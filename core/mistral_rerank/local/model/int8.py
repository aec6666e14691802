"""int8 linears for inference on a CPU, whose VNNI instructions multiply bytes twice as fast as bfloat16.

Weights are quantized once, with a scale for each output. Activations are quantized on the fly, with a scale for each
token.
"""

from __future__ import annotations

import torch
from torch import nn

QMAX = 127
"""The largest magnitude of a token, or of a row of weights, is quantized to this."""
ZERO_POINT = 128
"""The unsigned byte that represents zero: adding 128 to a signed byte flips its sign bit. oneDNN needs unsigned inputs
for its fast kernels."""


def multiplies_bytes() -> bool:
    """Tell whether the CPU has instructions for products of bytes; without them, sums of products can overflow."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


class ActivationQuantizer:
    """Quantizes the inputs of linears; `q_proj`, `k_proj` and `v_proj` have the same input and share the result.

    The result is valid until the next call with another input.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._quantized: tuple[torch.Tensor, torch.Tensor]
        self._allocate(0)

    def __call__(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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


def _absmax(states: torch.Tensor) -> torch.Tensor:
    """Return each token's absolute maximum, (tokens, 1).

    Without their sign bits, floats are in the same order as the integers of the same bits.
    """
    integer = {2: torch.int16, 4: torch.int32}[states.itemsize]
    return states.view(integer).bitwise_and(torch.iinfo(integer).max).amax(-1, keepdim=True).view(states.dtype)


class Int8Linear:
    """A linear with int8 weights and activations; the output has the dtype of the original weights.

    Args:
        linear: on the CPU; it can be freed afterwards.

    """

    def __init__(self, linear: nn.Linear) -> None:
        self._dtype = linear.weight.dtype
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * QMAX) / QMAX
        quantized = (weight / scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._scales, self._zero_points = scales, torch.zeros(len(scales), dtype=torch.int64)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def __call__(
        self, states: torch.Tensor, quantizer: ActivationQuantizer, _out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map (tokens, inputs) to (tokens, outputs), in new memory."""
        quantized, absmax = quantizer(states)
        products: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
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
