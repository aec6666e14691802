"""The Trainer of transformers, with a reranker's batches, forward, loss and validation."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from mistral_rerank.errors import MissingDependencyError, SettingsError
from mistral_rerank.local.batching.packing import Pack, pack
from mistral_rerank.local.batching.planning import plan_by_frequencies, plan_packed
from mistral_rerank.local.model.attention import span_masks, window_of
from mistral_rerank.local.model.pooling import LAST_TOKEN, PoolingConfig, apply_head, sequence_means
from mistral_rerank.local.model.rotary import same_frequencies
from mistral_rerank.training.losses import group_loss, ndcg

try:
    import accelerate  # noqa: F401 - the Trainer needs it
    import transformers
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError.of("train", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mistral_rerank.local.engine.tokenizer import PairTokenizer
    from mistral_rerank.training.groups import Group
    from mistral_rerank.training.settings import Loss

logger = logging.getLogger(__name__)

VALIDATION_METRIC = "eval_ndcg@10"
HEAD_RATE = 4.0
"""The head's learning rate over that of the LoRA matrices."""


class GroupCollator:
    """Packs groups into rows of tokens without padding, with the positions of the pairs' logits."""

    def __init__(
        self, tokenizer: PairTokenizer, batch_tokens: int, pooling: PoolingConfig = LAST_TOKEN, *, config: Any = None
    ) -> None:
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._pooling = pooling
        self._config = config

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Give the arguments of `group_logits`, and `grades` and `teacher`: (questions, passages), or None.

        `input_ids` are the tokens of all rows, by which the Trainer counts.
        """
        pairs = [(query, text) for group in groups for query in group.queries for text in group.passages]
        sequences = [pair.sequences[0] for pair in self._tokenizer.encode(pairs)]
        plan = functools.partial(plan_packed, budget=self._batch_tokens, share=self._pooling.shares)
        frequencies = same_frequencies(self._config, [len(sequence) for sequence in sequences])
        batches = plan_by_frequencies(plan, sequences, frequencies)
        packs = [pack(batch, causal=not self._pooling.bidirectional) for batch in batches]
        order = torch.tensor([member for packed in packs for member in packed.members])
        nan = float("nan")
        grades = [[nan if grade is None else grade for grade in row] for group in groups for row in group.grades]
        teacher = [row for group in groups if group.teacher for row in group.teacher]
        return {
            "input_ids": torch.cat([packed.ids for packed in packs], dim=1),
            "packs": packs,
            "positions": torch.argsort(order).view(len(grades), -1),
            "grades": torch.tensor(grades),
            "teacher": torch.tensor(teacher) if teacher else None,
        }


def group_logits(
    classifier: Any, pooling: PoolingConfig, *, packs: Sequence[Pack], positions: torch.Tensor, **_: object
) -> torch.Tensor:
    """Give the logits of packed groups.

    Args:
        classifier: a backbone with a `score` head, whose attention is `PACKED_ATTENTION`.
        pooling: pooling and attention of the model.
        packs: rows of sequences.
        positions: (questions, passages) int64, the index of each pair's logit in the concatenated rows.

    Returns:
        (questions, passages) float32.

    """
    backbone = classifier.base_model
    device = next(backbone.parameters()).device
    logits = []
    for packed in (row.to(device) for row in packs):
        hidden = backbone(
            input_ids=packed.ids,
            position_ids=packed.positions,
            attention_mask=None,
            use_cache=False,
            spans=packed.spans,
            masks=span_masks(packed, window=window_of(backbone)),
        ).last_hidden_state[0]
        pooled = sequence_means(hidden, packed) if pooling.mean else hidden[packed.last]
        logits.append(apply_head(classifier.score, pooled))
    return torch.cat(logits)[positions]


class LossProgress(transformers.ProgressCallback):
    """Shows loss and tokens/s on the progress bar; without a terminal as lines, with the time left."""

    def __init__(self, notice: Callable[[str], None] = logger.info) -> None:
        super().__init__()
        self._notice = notice

    def on_train_begin(self, _args: object, state: transformers.TrainerState, _control: object, **_: object) -> None:
        """Open the bar, which stays silent without a terminal."""
        self.training_bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, disable=None)
        self.current_step = 0
        self._first_step = state.global_step

    def on_log(
        self,
        _args: object,
        state: transformers.TrainerState,
        _control: object,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        """Show the loss of the last step."""
        if not logs or "loss" not in logs:
            return
        speed = f"{logs.get('train_tokens_per_second', 0):,.0f}"
        if not self.training_bar.disable:
            self.training_bar.set_postfix_str(f"loss={float(logs['loss']):.3f}, {speed} tokens/s")
        elif state.global_step % 10 == 0 or state.global_step == self._first_step + 1:
            seconds_per_step = logs["train_runtime"] / (state.global_step - self._first_step)
            hours, minutes = divmod(round((state.max_steps - state.global_step) * seconds_per_step / 60), 60)
            self._notice(
                f"step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}, "
                f"{state.num_input_tokens_seen:,} tokens, {speed} a second, {hours} h {minutes:02d} min left"
            )


class ValidateAtTheEnd(transformers.TrainerCallback):
    """Validates after the last step too, which older releases of transformers do not; they only save there."""

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **_: object,
    ) -> None:
        """Ask for the validation."""
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class GroupTrainer(transformers.Trainer):
    """The Trainer with the reranker's forward and loss."""

    def __init__(self, *args: Any, loss: Loss, distill: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss, self._distill = loss, distill
        self.model_accepts_loss_kwargs = False  # the loss is a mean: let the Trainer divide by the accumulation

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        **_: object,
    ) -> torch.Tensor:
        """Give the loss of one forward's groups."""
        grades, teacher = inputs.pop("grades"), inputs.pop("teacher")
        loss = group_loss(model(**inputs), grades, self._loss, teacher, self._distill)
        if not loss.isfinite():
            raise SettingsError(f"the loss is {loss.item()} after step {self.state.global_step}; lower learning_rate")
        return loss

    def evaluate(self, *_: object, **__: object) -> dict[str, float]:
        """Rank the passages of the validation groups, all of them in every process."""
        self.model.eval()
        scores = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for group in self.eval_dataset:
                inputs = self._prepare_inputs(self.data_collator([group]))
                grades = inputs.pop("grades")
                scores.append(ndcg(self.model(**inputs), grades))
        metrics = {VALIDATION_METRIC: float(torch.cat(scores).mean())}
        self.log(dict(metrics))
        self.control: transformers.TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Give AdamW, with a higher rate for the head."""
        weights = [item for item in (model or self.model).named_parameters() if item[1].requires_grad]
        rates = ((False, self.args.learning_rate), (True, HEAD_RATE * self.args.learning_rate))
        groups = [
            {"params": [weight for name, weight in weights if (".score." in name) == head], "lr": rate}
            for head, rate in rates
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay
        )
        return self.optimizer
