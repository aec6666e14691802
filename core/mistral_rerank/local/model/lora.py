"""LoRA adapters: merged into a weight once, or one of several on the same weights, merged for every product.

Adapters that share a base cost no second copy of it: the base's weights stay as they are, and a linear merges the
active adapter into memory that all linears share. Switching costs nothing, and no rounding error is left behind. The
merge takes rank / tokens of the product's multiplications, and reads the weight once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK = 2**18
"""Weights that a CPU merges at once, so that intermediate results stay in its cache."""


class LowRank(nn.Module):
    """The product of two matrices that an adapter adds to a weight (outputs, inputs).

    Args:
        down: (rank, inputs).
        up: (outputs, rank).
        scaling: of the product.

    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("down", down.detach().float())
        self.register_buffer("up", up.detach().float())
        self.scaling = scaling

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        return len(self.up), self.down.shape[1]

    @torch.no_grad()
    def merge(self, weight: Tensor, out: Tensor) -> Tensor:
        """Write the merged weight into `out`: computed in float32, then rounded to the dtype of `out`."""
        rows = max(1, BLOCK // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            product = torch.mm(self.up[block], self.down).mul_(self.scaling)
            out[block] = product.add_(weight[block].float())
        return out


class ActiveAdapter:
    """The adapter that the next forward applies, and the memory for merged weights.

    Attributes:
        name: of the adapter; None for the model without a named one.

    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._memory: Tensor | None = None

    def memory(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory of the shape of a weight, valid until the next call."""
        if self._memory is None or self._memory.numel() < weight.numel() or self._memory.device != weight.device:
            self._memory = torch.empty(weight.numel(), dtype=dtype, device=weight.device)
        return self._memory[: weight.numel()].view(weight.shape)


class AdaptedLinear(nn.Module):
    """A linear that several adapters share.

    Args:
        linear: of the base, with its stored weight.
        dtype: of inference; a base stored in another dtype is merged before it is rounded.
        adapters: what each adapter adds; the weight stays as it is for the others.
        active: names the adapter to apply.

    """

    weight: Tensor

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, adapters: Mapping[str | None, LowRank], active: ActiveAdapter
    ) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.bias = linear.bias
        self._dtype, self._adapters, self._active = dtype, dict(adapters), active
        self._moved = nn.ModuleList(adapters.values())  # `to` moves modules of a list, not of a dict

    def merged(self) -> Tensor:
        """Return the weight with the active adapter, valid until the next call of any linear."""
        low_rank = self._adapters.get(self._active.name)
        if low_rank is None and self.weight.dtype == self._dtype:
            return self.weight
        memory = self._active.memory(self.weight, self._dtype)
        return memory.copy_(self.weight) if low_rank is None else low_rank.merge(self.weight, memory)

    def forward(self, states: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        return nn.functional.linear(states, self.merged(), self.bias)
