"""Fit an early exit: teach it what the whole model says of pairs, from what the lower layers make of them.

The model itself does not change, and no judgement is needed. It reads every pair once; the states after the layer
wait in files until the last epoch is over, and only the exit, which is small, is trained on them.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch.nn.functional import kl_div

from mistral_rerank.errors import InvalidInputError, SettingsError
from mistral_rerank.local.early_exit import EarlyExit, normalized
from mistral_rerank.local.reranker import BATCH_TOKENS
from mistral_rerank.training.sources import load_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from mistral_rerank.local.reranker import LoadedCheckpoint
    from mistral_rerank.local.tokens import EncodedPair

    Question = tuple[str, tuple[str, ...]]
    Notify = Callable[[str, int, int], None]

HELD_OUT = 10
"""One question of so many is not trained on, and measured."""
FEWEST_QUESTIONS = 2 * HELD_OUT
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05


@dataclass(frozen=True, slots=True)
class FittedEarlyExit:
    """An early exit, and how well it does on the questions that it was not trained on.

    Attributes:
        early_exit: on the CPU, for inference.
        questions: how many it was trained on.
        held_out: how many others.
        best_kept: the share of them whose best passage, by the whole model, is in the better half by the
            estimates.
        correlation: of estimates and logits, over their pairs.

    """

    early_exit: EarlyExit
    questions: int
    held_out: int
    best_kept: float
    correlation: float

    def __str__(self) -> str:
        return (
            f"of {self.held_out} questions that it was not fitted on, {self.best_kept:.0%} have their best passage "
            f"in the better half by the estimates, whose correlation with the logits is {self.correlation:.2f}"
        )


def draw_questions(
    data: Sequence[Path],
    *,
    negatives: int = 11,
    random_negatives: int = 4,
    max_queries: int | None = None,
    seed: int,
) -> list[Question]:
    """Draw the questions of data sets with passages, each question once, in random order.

    Args:
        data: BEIR folders, or files of groups, whose passages are taken as they are.
        negatives: passages of a question that BM25 finds, beside one that answers.
        random_negatives: passages drawn from the whole corpus.
        max_queries: questions of each data set at most.
        seed: the same seed draws the same questions and passages.

    Raises:
        InvalidInputError: a data set cannot be read, or there are too few questions.

    """
    passages = {
        query: group.passages
        for source in data
        for group in load_groups(
            source,
            "train",
            questions=1,
            negatives=negatives,
            random_negatives=random_negatives,
            max_queries=max_queries,
            seed=seed,
        )
        for query in group.queries
    }
    if len(passages) < FEWEST_QUESTIONS:
        raise InvalidInputError(f"there are {len(passages)} questions to fit on; give at least {FEWEST_QUESTIONS}")
    return random.Random(seed).sample(list(passages.items()), len(passages))  # noqa: S311 - no security


def fit_early_exit(
    model: LoadedCheckpoint,
    questions: Sequence[Question],
    *,
    layer: int,
    epochs: int = 6,
    seed: int = 0,
    notify: Notify = lambda _what, _done, _total: None,
) -> FittedEarlyExit:
    """Fit an early exit on questions with passages.

    Args:
        model: was loaded for `states`.
        questions: as `draw_questions` gives them.
        layer: how many layers the estimates may use.
        epochs: times every question is seen.
        seed: the same seed gives the same weights on one thread.
        notify: told what is being done, how much of it is, and of how much.

    Raises:
        SettingsError: the model has no more layers than that.
        InputTooLongError: a question leaves no room for its passages.

    """
    if layer >= model.layers:
        raise SettingsError(f"the model has {model.layers} layers; give a layer from 1 to {model.layers - 1}")
    encoded = [
        model.encode([(query, passage) for passage in passages], "truncate", locate=True)
        for query, passages in questions
    ]
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for place, pairs in enumerate(encoded):
            files.append(Path(scratch) / f"{place}.safetensors")
            _read(model, pairs, layer).write(files[-1])
            notify("reading", place + 1, len(encoded))
        held_out, train = files[::HELD_OUT], [file for place, file in enumerate(files) if place % HELD_OUT]
        early_exit = _train(train, epochs=epochs, seed=seed, notify=notify)
        best_kept, correlation = _measure(early_exit, held_out)
    return FittedEarlyExit(early_exit, len(train), len(held_out), best_kept, correlation)


@dataclass(frozen=True, slots=True)
class _Example:
    """A question with passages.

    Attributes:
        states: (tokens, hidden) of each pair after the layer, with a mean square of 1; float16 in a file.
        passages: where the passage is in each.
        logits: (passages,) float32, of the whole model.

    """

    states: Sequence[Tensor]
    passages: Sequence[range]
    logits: Tensor

    def write(self, file: Path) -> None:
        places = torch.tensor([(len(s), p.start, p.stop) for s, p in zip(self.states, self.passages, strict=True)])
        states = torch.cat(list(self.states)).half()
        file.write_bytes(save({"states": states, "places": places, "logits": self.logits}))

    @classmethod
    def of(cls, file: Path) -> _Example:
        kept = load_file(file)
        lengths, starts, stops = kept["places"].T.tolist()
        passages = [range(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return cls(torch.split(kept["states"].float(), lengths), passages, kept["logits"])


def _read(model: LoadedCheckpoint, pairs: Sequence[EncodedPair], layer: int) -> _Example:
    """Let the model read pairs, as far as the layer and to the end."""
    sequences, passages = [pair.sequences[0] for pair in pairs], [pair.passages[0] for pair in pairs]
    states: list[Tensor] = [torch.empty(0)] * len(sequences)
    logits = [0.0] * len(sequences)
    for batch in model.plan(sequences, BATCH_TOKENS["cpu"]):
        row = [sequences[place] for place in batch]
        begun = model.states(row, layer)
        for place, own, logit in zip(batch, begun, model.logits(row, begun), strict=True):
            states[place], logits[place] = normalized(own.states).cpu(), logit
    return _Example(states, passages, torch.tensor(logits))


def _loss(estimates: Tensor, logits: Tensor) -> Tensor:
    """Miss the logits, and their softmax over a question's passages, which is what a choice of the best rests on."""
    missed = kl_div(estimates.log_softmax(0), logits.log_softmax(0), log_target=True, reduction="sum")
    return (estimates - logits).square().mean() / 4 + missed


def _train(files: Sequence[Path], *, epochs: int, seed: int, notify: Notify) -> EarlyExit:
    first = _Example.of(files[0])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        early_exit = EarlyExit(first.states[0].shape[1])
    with torch.no_grad():
        early_exit.around.bias.add_((first.logits - early_exit(first.states, first.passages)).mean())
    optimizer = torch.optim.AdamW(early_exit.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps, rng = epochs * len(files), random.Random(seed)  # noqa: S311 - no security
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    for step in range(steps):
        if step % len(files) == 0:
            order = rng.sample(files, len(files))
        example = _Example.of(order[step % len(files)])
        optimizer.zero_grad()
        _loss(early_exit(example.states, example.passages), example.logits).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        notify("fitting", step + 1, steps)
    return early_exit.eval().requires_grad_(False)


def _measure(early_exit: EarlyExit, files: Sequence[Path]) -> tuple[float, float]:
    """Give the share of questions that keep their best passage, and the correlation."""
    kept, estimated, wanted = 0, [], []
    for file in files:
        example = _Example.of(file)
        estimates = early_exit(example.states, example.passages)
        kept += int(example.logits.argmax() in estimates.topk(len(estimates) // 2).indices)
        estimated.append(estimates)
        wanted.append(example.logits)
    both = torch.stack([torch.cat(estimated), torch.cat(wanted)])
    return kept / len(files), float(both.corrcoef()[0, 1])
