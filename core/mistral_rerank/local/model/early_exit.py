"""The early exit: estimates a pair's logit from the hidden states of a lower layer.

Lower layers say little about relevance in the last token's state, which the model's head reads. So the early exit
compares each token of the question with the most similar token of the passage, as ColBERT does (arXiv 2004.12832).
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
"""In a subfolder: other engines load every safetensors file beside `config.json` as weights."""
WIDTH = 96
"""Dimensions of the vectors that are compared."""
EPSILON = 1e-5


class EarlyExitConfig(BaseModel):
    """The metadata of the weights' file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(ge=1, description="number of layers below the early exit")
    fitted_on: tuple[str, ...] = Field(default=(), description="names of the data sets")
    questions: int = Field(default=0, ge=0, description="number of questions it was fitted on")

    def __str__(self) -> str:
        return f"after layer {self.layer}, fitted on {self.questions} questions of {', '.join(self.fitted_on)}"


class EarlyExit(nn.Module):
    """Estimates logits from the hidden states of a layer, which have `hidden` dimensions."""

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
        """Estimate the logits of pairs.

        Args:
            states: (tokens, hidden) float32 of each pair, after the early exit's layer.
            passages: the passage's tokens in each pair; the others are the question and the rest of the prompt.

        Returns:
            (pairs,) float32.

        """
        estimates = []
        for pair_states, passage in zip(map(normalized, states), passages, strict=True):
            passage_states = pair_states[passage.start : passage.stop]
            question_states = torch.cat([pair_states[: passage.start], pair_states[passage.stop :]])
            question = normalize(self.question(question_states), dim=-1)
            answer = normalize(self.passage(passage_states), dim=-1)
            weights = softplus(self.importance(question_states)).squeeze(-1)
            nearest = (question @ answer.T).amax(-1) if len(answer) else question.new_zeros(len(question))
            similarity = (nearest * weights).sum() / weights.sum()
            offset = self.around(torch.cat([pair_states[-1], question_states.mean(0)])).squeeze(-1)
            estimates.append(self.scale * similarity + offset)
        return torch.stack(estimates)


def normalized(states: Tensor) -> Tensor:
    """Scale states (tokens, hidden) to a mean square of 1."""
    return states * (states.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def write_early_exit(early_exit: EarlyExit, config: EarlyExitConfig, folder: Path) -> None:
    """Write an early exit into a checkpoint folder, atomically."""
    file = folder / EARLY_EXIT_FILE
    file.parent.mkdir(exist_ok=True)
    with replacement(file) as temporary:
        temporary.write_bytes(save(early_exit.state_dict(), metadata={"early_exit": config.model_dump_json()}))


def read_early_exit_config(folder: Path) -> EarlyExitConfig | None:
    """Read the early exit's metadata from a checkpoint folder; None if it has none.

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
    """Read the early exit of a checkpoint folder, for inference on states of `hidden` dimensions.

    Raises:
        CheckpointError: its weights are missing, or of another shape.

    """
    early_exit = EarlyExit(hidden)
    try:
        early_exit.load_state_dict(load_file(folder / EARLY_EXIT_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / EARLY_EXIT_FILE} is not usable: {error}") from error
    return early_exit.eval().requires_grad_(False)
