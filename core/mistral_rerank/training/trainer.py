"""The Trainer of transformers, with a reranker's batches, forward, loss and validation."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.local.attention import span_masks
from mistral_rerank.local.backbone import window_of
from mistral_rerank.local.model import apply_head
from mistral_rerank.local.packing import Pack, pack, plan_packs, sequence_means
from mistral_rerank.local.reading import LAST_TOKEN, Reading
from mistral_rerank.training.losses import Loss, group_loss
from mistral_rerank.training.validation import ndcg

try:
    import accelerate  # noqa: F401 - the Trainer needs it
    import transformers
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError.of("train", error) from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.local.tokens import PairTokenizer
    from mistral_rerank.training.groups import Group

logger = logging.getLogger(__name__)

VALIDATION_METRIC = "eval_ndcg@10"

HEAD_RATE = 4.0
"""The head's learning rate over that of the LoRA matrices."""


class GroupCollator:
    """Turns groups into rows of tokens without padding, and says how to put the logits back in order."""

    def __init__(self, tokenizer: PairTokenizer, batch_tokens: int, reading: Reading = LAST_TOKEN) -> None:
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._reading = reading

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Give the arguments of `group_logits`, and `grades` and `teacher`: (questions, passages), or None."""
        pairs = [(query, text) for group in groups for query in group.queries for text in group.passages]
        sequences = [pair.sequences[0] for pair in self._tokenizer.encode(pairs)]
        rows = plan_packs(sequences, self._batch_tokens, share=self._reading.shares)
        packs = [pack(sequences, trees, causal=not self._reading.bidirectional) for trees in rows]
        order = torch.tensor([member for packed in packs for member in packed.members])
        nan = float("nan")
        grades = [[nan if grade is None else grade for grade in row] for group in groups for row in group.grades]
        teacher = [row for group in groups if group.teacher for row in group.teacher]
        return {
            "packs": packs,
            "places": torch.argsort(order).view(len(grades), -1),
            "grades": torch.tensor(grades),
            "teacher": torch.tensor(teacher) if teacher else None,
        }


def group_logits(
    classifier: Any, reading: Reading, *, packs: Sequence[Pack], places: torch.Tensor, **_: object
) -> torch.Tensor:
    """Run the rows of some groups through a classifier.

    Args:
        classifier: a backbone with a `score` head.
        reading: how it reads a sequence.
        packs: rows of sequences.
        places: (questions, passages) int64, where a pair's logit lies in the joined rows.

    Returns:
        (questions, passages) float32.

    """
    return torch.cat([_row_logits(classifier, reading, packed) for packed in packs])[places]


def _row_logits(classifier: Any, reading: Reading, packed: Pack) -> torch.Tensor:
    """Run one row, whose attention is `PACKED_ATTENTION`: (members,) float32."""
    backbone = classifier.base_model
    packed = packed.to(next(backbone.parameters()).device)
    hidden = backbone(
        input_ids=packed.ids,
        position_ids=packed.positions,
        attention_mask=None,
        use_cache=False,
        spans=packed.spans,
        masks=span_masks(packed, window=window_of(backbone)),
    ).last_hidden_state[0]
    return apply_head(classifier.score, sequence_means(hidden, packed) if reading.mean else hidden[packed.last])


class LossProgress(transformers.ProgressCallback):
    """Shows loss and tokens/s on the progress bar; without a terminal the log has them, with the time left."""

    def on_train_begin(self, _args: object, state: transformers.TrainerState, _control: object, **_: object) -> None:
        """Open the bar, which stays silent without a terminal."""
        self.training_bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, disable=None)
        self.current_step = 0
        self._first_step, self._started = state.global_step, time.monotonic()

    def on_log(
        self,
        _args: object,
        state: transformers.TrainerState,
        _control: object,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Take up the loss of the last step."""
        if not logs or "loss" not in logs:
            return
        pace = Pace.of(state, since_step=self._first_step, seconds=time.monotonic() - self._started)
        if not self.training_bar.disable:
            self.training_bar.set_postfix_str(
                f"loss={float(logs['loss']):.3f}, {pace.tokens_per_second:,.0f} tokens/s"
            )
        elif state.global_step % 10 == 0:
            logger.info("step %d of %d, loss %.3f, %s", state.global_step, state.max_steps, float(logs["loss"]), pace)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run is.

    Attributes:
        tokens: seen so far, by all processes; what several pairs share counts once.
        tokens_per_second: since this process started, validation included.
        seconds_left: until the last step, at this speed.

    """

    tokens: int
    tokens_per_second: float
    seconds_left: float

    @classmethod
    def of(cls, state: transformers.TrainerState, *, since_step: int, seconds: float) -> Pace:
        """Compute it from the Trainer's log.

        Args:
            state: of the Trainer, whose log has the tokens of every step.
            since_step: steps done before the time was taken: a resumed run starts later than 0.
            seconds: wall time since then; more than 0.

        """
        new = sum(entry["tokens"] for entry in state.log_history if entry["step"] > since_step and "tokens" in entry)
        steps = state.global_step - since_step
        return cls(seen_tokens(state), new / seconds, (state.max_steps - state.global_step) * seconds / steps)

    def __str__(self) -> str:
        hours, minutes = divmod(round(self.seconds_left / 60), 60)
        return f"{self.tokens:,} tokens, {self.tokens_per_second:,.0f} a second, {hours} h {minutes:02d} min left"


def seen_tokens(state: transformers.TrainerState) -> int:
    """Sum up the tokens of all steps so far, those before a stop included."""
    return sum(entry["tokens"] for entry in state.log_history if "tokens" in entry)


class ValidateAtTheEnd(transformers.TrainerCallback):
    """Validates after the last step too, wherever it falls; the Trainer saves there already."""

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: object,
    ) -> None:
        """Ask for it."""
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class GroupTrainer(transformers.Trainer):
    """The Trainer with the reranker's forward and loss."""

    def __init__(self, *args: Any, loss: Loss, distill: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss, self._distill = loss, distill
        self._tokens = 0  # since the last step
        self.model_accepts_loss_kwargs = False  # the loss is a mean: let the Trainer divide by the accumulation

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        **_: object,
    ) -> torch.Tensor:
        """Give the loss of one forward's groups."""
        grades, teacher = inputs.pop("grades"), inputs.pop("teacher")
        self._tokens += sum(packed.ids.numel() for packed in inputs["packs"])
        loss = group_loss(model(**inputs), grades, self._loss, teacher, self._distill)
        if not loss.isfinite():
            raise SettingsError(f"the loss is {loss.item()} after step {self.state.global_step}; lower learning_rate")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the tokens of the step, summed over the processes."""
        if "loss" in logs:
            tokens = torch.tensor(self._tokens, device=self.args.device)
            logs["tokens"] = int(self.accelerator.reduce(tokens, "sum"))
            self._tokens = 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Rank the passages of the validation groups; every process does all of them."""
        self.model.eval()
        found = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for group in self.eval_dataset:
                inputs = self._prepare_inputs(self.data_collator([group]))
                grades = inputs.pop("grades")
                found.append(ndcg(self.model(**inputs), grades))
        metrics = {VALIDATION_METRIC: float(torch.cat(found).mean())}
        self.log(dict(metrics))
        told = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control: transformers.TrainerControl = told
        return metrics

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Give AdamW, with a higher rate for the head."""
        trained = [item for item in (model or self.model).named_parameters() if item[1].requires_grad]
        rates = ((False, self.args.learning_rate), (True, HEAD_RATE * self.args.learning_rate))
        groups = [
            {"params": [weight for name, weight in trained if (".score." in name) == head], "lr": rate}
            for head, rate in rates
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay
        )
        return self.optimizer
