"""An early exit: a guess at a pair's logit from the hidden states of a lower layer.

The state of the last token, which the model's own head reads, learns of relevance late, in the upper layers. What
tells earlier is the question's tokens beside the passage's, each with the most
similar one, as in ColBERT (arXiv 2004.12832).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from mistral_rerank.data_files.atomic import replacement
from mistral_rerank.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EARLY_EXIT_FILE = "early_exit/model.safetensors"
"""In a folder of its own, since other engines read every safetensors file beside a model's as its weights."""
WIDTH = 96
"""Of the vectors that tokens are compared by."""
EPSILON = 1e-5


class EarlyExitConfig(BaseModel):
    """What the weights are for, in the metadata of their file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(ge=1, description="how many layers it needs")
    fitted_on: tuple[str, ...] = Field(default=(), description="names of the data sets")
    questions: int = Field(default=0, ge=0, description="how many it was fitted on")

    def __str__(self) -> str:
        return f"after layer {self.layer}, fitted on {self.questions} questions of {', '.join(self.fitted_on)}"


class EarlyExit(nn.Module):
    """Estimates logits from the hidden states of a layer.

    Args:
        hidden: width of the states.

    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.passage = nn.Linear(hidden, WIDTH, bias=False)
        self.question = nn.Linear(hidden, WIDTH, bias=False)
        self.importance = nn.Linear(hidden, 1)
        self.around = nn.Linear(2 * hidden, 1)
        self.scale = nn.Parameter(torch.tensor(32.0))
        self.question.weight.data.copy_(self.passage.weight.data)  # equal states are similar from the start
        nn.init.zeros_(self.importance.weight)
        nn.init.zeros_(self.around.weight)

    def forward(self, states: Sequence[Tensor], passages: Sequence[range]) -> Tensor:
        """Estimate the logits of some pairs.

        Args:
            states: (tokens, hidden) float32 of each pair, after a layer.
            passages: where the passage is in each; the other tokens are the question and the words around it.

        Returns:
            (pairs,) float32.

        """
        estimates = []
        for own, passage in zip(map(normalized, states), passages, strict=True):
            around, told = torch.cat([own[: passage.start], own[passage.stop :]]), own[passage.start : passage.stop]
            question, answer = (normalize(f(x), dim=-1) for f, x in ((self.question, around), (self.passage, told)))
            weights = softplus(self.importance(around)).squeeze(-1)
            nearest = (question @ answer.T).amax(-1) if len(told) else question.new_zeros(len(question))
            similar = (nearest * weights).sum() / weights.sum()
            whole = self.around(torch.cat([own[-1], around.mean(0)])).squeeze(-1)
            estimates.append(self.scale * similar + whole)
        return torch.stack(estimates)


def normalized(states: Tensor) -> Tensor:
    """Scale states (tokens, hidden) to a mean square of 1; done twice it changes nothing."""
    return states * (states.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def write_early_exit(early_exit: EarlyExit, config: EarlyExitConfig, folder: Path) -> None:
    """Write an early exit into a checkpoint folder, whole or not at all."""
    file = folder / EARLY_EXIT_FILE
    file.parent.mkdir(exist_ok=True)
    with replacement(file) as beside:
        beside.write_bytes(save(early_exit.state_dict(), metadata={"early_exit": config.model_dump_json()}))


def read_early_exit_config(folder: Path) -> EarlyExitConfig | None:
    """Say what early exit a checkpoint folder has; None for none.

    Raises:
        CheckpointError: the file is not usable.

    """
    file = folder / EARLY_EXIT_FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            return EarlyExitConfig.model_validate_json((tensors.metadata() or {})["early_exit"])
    except (OSError, SafetensorError, LookupError, ValidationError) as error:
        raise CheckpointError(f"{file} is not usable: {error}") from error


def read_early_exit(folder: Path, hidden: int) -> EarlyExit:
    """Read the early exit of a checkpoint folder whose states are `hidden` wide, for inference.

    Raises:
        CheckpointError: its weights are missing, or of another shape.

    """
    early_exit = EarlyExit(hidden)
    try:
        early_exit.load_state_dict(load_file(folder / EARLY_EXIT_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / EARLY_EXIT_FILE} is not usable: {error}") from error
    return early_exit.eval().requires_grad_(False)
