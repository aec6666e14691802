"""What a training run leaves behind: the checkpoint, its figures, their plot and a model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_rerank.evaluation.plots import line_plot, standalone
from mistral_rerank.local.checkpoint import RERANK_JSON
from mistral_rerank.training.trainer import VALIDATION_METRIC, seen_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState

    from mistral_rerank.local.checkpoint import CheckpointConfig
    from mistral_rerank.training.finetune import TrainSettings

CARD = "README.md"
SMOOTHED = 40
"""The plot shows the mean loss of about so many stretches of the run, not every step."""


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """The figures of a run.

    Attributes:
        settings: all of them, data sets by name.
        groups: of one epoch.
        validation_groups: ranked after every `save_steps`.
        steps: of the optimizer.
        tokens: seen in all steps; what several pairs share counts once.
        best_step: whose weights were kept; the last, where there was no validation.
        loss: of every step.
        validation: step -> mean nDCG@10.

    """

    settings: dict[str, Any]
    groups: int
    validation_groups: int
    steps: int
    tokens: int
    best_step: int
    loss: list[float]
    validation: dict[int, float]

    @classmethod
    def of(
        cls, settings: TrainSettings, state: TrainerState, *, groups: int, validation_groups: int
    ) -> TrainingRecord:
        """Read them from the Trainer's log."""
        named: dict[str, Any] = {
            key: [source.name for source in getattr(settings, key)] for key in ("data", "validation")
        }
        named |= {key: value and _short(value) for key, value in (("base", settings.base), ("init", settings.init))}
        validation = {
            entry["step"]: round(float(entry[VALIDATION_METRIC]), 4)
            for entry in state.log_history
            if VALIDATION_METRIC in entry
        }
        return cls(
            settings=settings.model_dump(mode="json") | named,
            groups=groups,
            validation_groups=validation_groups,
            steps=state.global_step,
            tokens=seen_tokens(state),
            best_step=(validation and state.best_global_step) or state.global_step,
            loss=[round(float(entry["loss"]), 4) for entry in state.log_history if "loss" in entry],
            validation=validation,
        )


def write_checkpoint(
    model: PreTrainedModel, config: CheckpointConfig, record: TrainingRecord, *, beside: Path, out: Path
) -> None:
    """Write a folder with adapter, head, `rerank.json`, figures, plot and card, whole or not at all.

    Args:
        model: base and adapter.
        config: what the checkpoint says of itself.
        record: the run's figures.
        beside: a folder on the same disk to write in first.
        out: the folder to make.

    """
    finished = beside / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path = config.base.name if config.base else None
    adapter.target_modules = sorted(adapter.target_modules)
    adapter.modules_to_save = sorted(set(adapter.modules_to_save))  # PEFT adds the head again on every load
    model.save_pretrained(finished, save_embedding_layers=False)
    (finished / RERANK_JSON).write_text(config.model_dump_json(indent=2) + "\n", "utf-8")
    (finished / "training.json").write_text(json.dumps(asdict(record)) + "\n", "utf-8")
    (finished / "training.svg").write_text(standalone(_plot(record)), "utf-8")
    (finished / CARD).write_text(card(out.name, config, record, rank=adapter.r), "utf-8")
    finished.rename(out)


def card(name: str, config: CheckpointConfig, record: TrainingRecord, *, rank: int) -> str:
    """Write a model card of what the run knows; what only its author knows is left to be filled in."""
    settings = record.settings
    base = _short(config.base.name) if config.base else "a local folder"
    layers = f", its first {config.base.layers} layers" if config.base and config.base.layers else ""
    start, end = _mean(record.loss[:5]), _mean(record.loss[-5:])
    result = f"The mean loss of five steps went from {start:.3f} to {end:.3f}, over {record.tokens:,} tokens."
    if record.validation:
        first, best = next(iter(record.validation.values())), record.validation[record.best_step]
        names = ", ".join(settings["validation"])
        result += (
            f"\nOn {record.validation_groups} groups kept out of training ({names}) nDCG@10 went from {first:.4f},"
            f"\nwhen first looked at, to {best:.4f} after step {record.best_step} of {record.steps}: these weights."
        )
    pooled = "the last token's hidden state" if config.pooling == "last" else "the mean of all hidden states"
    trained = f"with LoRA matrices of rank {rank} and a binary head on {pooled}"
    data = f"{', '.join(settings['data'])}: {record.groups} groups an epoch"
    chosen = "\n".join(f"| {key} | `{value}` |" for key, value in settings.items() if value not in (None, [], ""))
    return f"""---
library_name: peft
pipeline_tag: text-ranking
tags: [reranker, mistral-rerank]
base_model: {base}
---

# {name}

A reranker: given a question and a passage it says how likely it is that the passage answers the question.

- Base: {base}{layers}, {trained}
- Data: {data}. *Their licences and where they come from: to be filled in.*
- Input: `{config.template!r}`, trained on up to {settings["max_length"]} tokens
- Output: a logit; its sigmoid is a probability, which means something after `mistral-rerank calibrate`

## Use

```
mistral-rerank rank QUESTION FILE --model {name}
mistral-rerank evaluate --data SET --model {name} --out report
```

## Training

{result}

![loss and nDCG@10](training.svg)

| setting | value |
|---|---|
{chosen}

## Evaluation, bias, safety

*To be filled in: what `mistral-rerank evaluate` finds on data of the domain, and whom its errors would hurt.*
"""


def _short(name: str) -> str:
    """Leave the folders above a local one out: a card is for others to read."""
    return Path(name).name if Path(name).is_dir() else name


def _plot(record: TrainingRecord) -> str:
    """Draw the loss, smoothed, and the validations, over the steps."""
    stretch = max(1, len(record.loss) // SMOOTHED)
    starts = range(0, len(record.loss), stretch)
    series = {"loss": [(float(i + 1), _mean(record.loss[i : i + stretch])) for i in starts]}
    if record.validation:
        series["nDCG@10"] = [(float(step), value) for step, value in record.validation.items()]
    return line_plot(series, title="Loss and nDCG@10 over the steps", x_name="step", y_name="")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
