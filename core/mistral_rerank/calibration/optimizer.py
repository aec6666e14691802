"""Maximum likelihood fits of a few parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def minimize(loss: Callable[[Tensor], Tensor], start: Sequence[float]) -> list[float]:
    """Minimize a smooth function by L-BFGS in float64, until its gradient is below 1e-11.

    Args:
        loss: of the parameters, (len(start),) float64; a mean, not a sum, over the data.
        start: the initial parameters.

    """
    parameters = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=200, tolerance_grad=1e-11, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return [float(value) for value in parameters.detach()]
