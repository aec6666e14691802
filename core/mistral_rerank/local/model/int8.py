"""Linears in 8 bits, for inference on a CPU: its VNNI instructions multiply bytes twice as fast as bfloat16.

Weights are rounded once, with a scale for each output; inputs as they come, with a scale for each token.
"""

from __future__ import annotations

import torch
from torch import nn

QMAX = 127
"""What the largest magnitude of a token, or of a row of weights, becomes."""
ZERO_POINT = 128
"""What stands for zero in an unsigned byte, whose products are faster than a signed one's: its sign bit, flipped."""


def multiplies_bytes() -> bool:
    """Tell whether the CPU is known to have instructions for it; without, sums of products of bytes can overflow."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


class ActivationQuantizer:
    """Rounds inputs; linears that are given the same one in turn, as `q_proj` and `k_proj` are, share the result.

    A result lies in memory that the next one overwrites.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._rounded: tuple[torch.Tensor, torch.Tensor]
        self._make_room(0)

    def __call__(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give bytes (tokens, inputs), and what `QMAX` stands for in each token, (tokens, 1) as `states`."""
        if states is not self._last:
            largest = _largest(states).clamp_min(torch.finfo(states.dtype).tiny * QMAX)
            if self._bytes.numel() < states.numel():
                self._make_room(states.numel())
            scaled, signed = (room[: states.numel()].view(states.shape) for room in (self._scaled, self._bytes))
            signed.copy_(torch.mul(states, QMAX / largest.float(), out=scaled).round_())
            self._last, self._rounded = states, (signed.view(torch.uint8).bitwise_xor_(ZERO_POINT), largest)
        return self._rounded

    def _make_room(self, numbers: int) -> None:
        self._scaled = torch.empty(numbers, dtype=torch.float32)  # the default dtype may be another for a moment
        self._bytes = torch.empty(numbers, dtype=torch.int8)


def _largest(states: torch.Tensor) -> torch.Tensor:
    """Give each token's largest magnitude, (tokens, 1): without the sign bit, floats are in order as integers."""
    integer = {2: torch.int16, 4: torch.int32}[states.itemsize]
    return states.view(integer).bitwise_and(torch.iinfo(integer).max).amax(-1, keepdim=True).view(states.dtype)


class Int8Linear:
    """A linear whose weights and inputs are bytes, and whose output has the dtype that its weights had.

    Args:
        linear: on the CPU; it is not needed afterwards.

    """

    def __init__(self, linear: nn.Linear) -> None:
        self._dtype = linear.weight.dtype
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * QMAX) / QMAX
        rounded = (weight / scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._scales, self._zeros = scales, torch.zeros(len(scales), dtype=torch.int64)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def __call__(
        self, states: torch.Tensor, quantizer: ActivationQuantizer, _out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply (tokens, inputs) to (tokens, outputs), in memory of its own."""
        rounded, largest = quantizer(states)
        products: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1 / QMAX,
            ZERO_POINT,
            self._weight,
            self._scales,
            self._zeros,
            None,  # the bias comes after a token's own scale
            1.0,
            0,
            self._dtype,
            "none",
            [],
            "",
        )
        products.mul_(largest)
        return products if self._bias is None else products.add_(self._bias)
