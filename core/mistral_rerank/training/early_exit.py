"""Fit an early exit: a small head that estimates the model's logits from the hidden states of a lower layer.

The model does not change, and judgements are not needed. It runs once on every pair. The early exit is trained on its
hidden states, which are in temporary files.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save

from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.local.model.early_exit import EarlyExit, normalized
from mistral_rerank.local.reranker import BATCH_TOKENS
from mistral_rerank.training.losses import distillation
from mistral_rerank.training.mining import load_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from mistral_rerank.local.engine.tokenizer import EncodedPair
    from mistral_rerank.local.scorer import LoadedCheckpoint
    from mistral_rerank.training.settings import TrainSettings

    Question = tuple[str, tuple[str, ...]]
    Notify = Callable[[str, int, int], None]

HELD_OUT = 10
"""One question in this many is held out for measuring."""
MIN_QUESTIONS = 2 * HELD_OUT
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05


@dataclass(frozen=True, slots=True)
class FittedEarlyExit:
    """An early exit and its quality on held-out questions.

    Attributes:
        early_exit: on the CPU, for inference.
        questions: number of questions that it was trained on.
        held_out: number of held-out questions.
        best_retained: share of held-out questions whose best passage by logit is in the better half by estimate.
        correlation: of estimates and logits over the held-out pairs.

    """

    early_exit: EarlyExit
    questions: int
    held_out: int
    best_retained: float
    correlation: float

    def __str__(self) -> str:
        return (
            f"of {self.held_out} questions that it was not fitted on, {self.best_retained:.0%} have their best passage "
            f"in the better half by the estimates, whose correlation with the logits is {self.correlation:.2f}"
        )


def draw_questions(settings: TrainSettings) -> list[Question]:
    """Draw the questions of data sets with passages, each question once, in random order.

    Args:
        settings: the data, `max_queries`, the number of passages and the seed. A file of groups has its passages.

    Raises:
        InvalidInputError: a data set cannot be read, or there are too few questions.

    """
    passages = {
        query: group.passages
        for source in settings.data
        for group in load_groups(source, settings, "train")
        for query in group.queries
    }
    if len(passages) < MIN_QUESTIONS:
        raise InvalidInputError(f"there are {len(passages)} questions to fit on; give at least {MIN_QUESTIONS}")
    return random.Random(settings.seed).sample(list(passages.items()), len(passages))  # noqa: S311 - no security


def fit_early_exit(
    model: LoadedCheckpoint,
    questions: Sequence[Question],
    *,
    layer: int,
    epochs: int = 6,
    seed: int = 0,
    notify: Notify = lambda _step, _done, _total: None,
) -> FittedEarlyExit:
    """Fit an early exit on questions with passages.

    Args:
        model: loaded with `resumable=True`.
        questions: as `draw_questions` gives them.
        layer: number of layers that the estimates use.
        epochs: passes over the questions.
        seed: the same seed gives the same weights on one thread.
        notify: receives the step, the number of items done, and the total.

    Raises:
        SettingsError: the model has no layer above `layer`.
        InputTooLongError: a question leaves no room for its passages.

    """
    if layer >= model.layers:
        raise SettingsError(f"the model has {model.layers} layers; give a layer from 1 to {model.layers - 1}")
    encoded = [
        model.tokenizer.encode([(query, passage) for passage in passages], "truncate", locate=True)
        for query, passages in questions
    ]
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for number, pairs in enumerate(encoded):
            files.append(Path(scratch) / f"{number}.safetensors")
            _run(model, pairs, layer).write(files[-1])
            notify("reading", number + 1, len(encoded))
        held_out, train = files[::HELD_OUT], [file for number, file in enumerate(files) if number % HELD_OUT]
        early_exit = _train(train, epochs=epochs, seed=seed, notify=notify)
        best_retained, correlation = _measure(early_exit, held_out)
    return FittedEarlyExit(early_exit, len(train), len(held_out), best_retained, correlation)


@dataclass(frozen=True, slots=True)
class _Example:
    """The training example of one question.

    Attributes:
        states: (tokens, hidden) of each pair after the layer, with a mean square of 1; float16 in a file.
        passages: token positions of the passage in each pair.
        logits: (passages,) float32, of the whole model.

    """

    states: Sequence[Tensor]
    passages: Sequence[range]
    logits: Tensor

    def write(self, file: Path) -> None:
        spans = torch.tensor([(len(s), p.start, p.stop) for s, p in zip(self.states, self.passages, strict=True)])
        states = torch.cat(list(self.states)).half()
        file.write_bytes(save({"states": states, "spans": spans, "logits": self.logits}))

    @classmethod
    def load(cls, file: Path) -> _Example:
        tensors = load_file(file)
        lengths, starts, stops = tensors["spans"].T.tolist()
        passages = [range(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return cls(torch.split(tensors["states"].float(), lengths), passages, tensors["logits"])


def _run(model: LoadedCheckpoint, pairs: Sequence[EncodedPair], layer: int) -> _Example:
    """Run the model on pairs, for their hidden states after `layer` and their logits."""
    sequences, passages = [pair.sequences[0] for pair in pairs], [pair.passages[0] for pair in pairs]
    states: list[Tensor] = [torch.empty(0)] * len(sequences)
    logits = [0.0] * len(sequences)
    for batch in model.model.plan(sequences, BATCH_TOKENS["cpu"]):
        partial = model.model.states(batch, layer)
        for index, hidden, logit in zip(batch.members, partial, model.model.logits(batch, partial), strict=True):
            states[index], logits[index] = normalized(hidden.states).cpu(), logit
    return _Example(states, passages, torch.tensor(logits))


def _train(files: Sequence[Path], *, epochs: int, seed: int, notify: Notify) -> EarlyExit:
    """Minimize the squared error of the logits and the divergence of their softmax over a question's passages."""
    first = _Example.load(files[0])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        early_exit = EarlyExit(first.states[0].shape[1])
    with torch.no_grad():
        early_exit.around.bias.add_((first.logits - early_exit(first.states, first.passages)).mean())
    optimizer = torch.optim.AdamW(early_exit.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps, rng = epochs * len(files), random.Random(seed)  # noqa: S311 - no security
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    order = [file for _ in range(epochs) for file in rng.sample(files, len(files))]
    for step, example in enumerate(map(_Example.load, order), start=1):
        optimizer.zero_grad()
        estimates = early_exit(example.states, example.passages)
        loss = (estimates - example.logits).square().mean() / 4 + distillation(estimates[None], example.logits[None])
        loss.backward()
        optimizer.step()
        schedule.step()
        notify("fitting", step, steps)
    return early_exit.eval().requires_grad_(False)


def _measure(early_exit: EarlyExit, files: Sequence[Path]) -> tuple[float, float]:
    """Give `best_retained` and `correlation` of `FittedEarlyExit`."""
    retained, estimates, logits = 0, [], []
    for example in map(_Example.load, files):
        estimates.append(early_exit(example.states, example.passages))
        logits.append(example.logits)
        retained += int(logits[-1].argmax() in estimates[-1].topk(len(logits[-1]) // 2).indices)
    both = torch.stack([torch.cat(estimates), torch.cat(logits)])
    return retained / len(files), float(both.corrcoef()[0, 1])
