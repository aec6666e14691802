"""The files of a finished training run: the checkpoint, its figures, their plot and a model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING, Any

from mistral_rerank.evaluation.plots import line_plot
from mistral_rerank.local.checkpoints.config import RERANK_JSON
from mistral_rerank.training.trainer import VALIDATION_METRIC

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState

    from mistral_rerank.local.checkpoints.config import CheckpointConfig
    from mistral_rerank.training.settings import TrainSettings

PLOT_POINTS = 40
"""The plot shows the mean loss of about this many windows of steps."""


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """The figures of a run.

    Attributes:
        settings: all settings, with data sets by name.
        groups: number of groups in an epoch.
        validation_groups: number of groups ranked after every `save_steps`.
        steps: number of optimizer steps.
        tokens: number of tokens in all steps; a shared prefix counts once.
        best_step: step of the checkpoint's weights; the last one without validation.
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
    def of(cls, settings: TrainSettings, state: TrainerState, *, groups: int, validation_groups: int) -> TrainingRecord:
        """Read them from the Trainer's log."""
        named: dict[str, Any] = {
            key: [path.resolve().name for path in getattr(settings, key)] for key in ("data", "validation")
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
            tokens=state.num_input_tokens_seen,
            best_step=(validation and state.best_global_step) or state.global_step,
            loss=[round(float(entry["loss"]), 4) for entry in state.log_history if "loss" in entry],
            validation=validation,
        )


def write_checkpoint(
    model: PreTrainedModel, config: CheckpointConfig, record: TrainingRecord, *, scratch: Path, out: Path
) -> None:
    """Write a folder with adapter, head, `rerank.json`, figures, plot and card, atomically by way of `scratch`."""
    finished = scratch / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    adapter = model.peft_config["default"]
    base_name = config.base.name if config.base else None
    adapter.base_model_name_or_path = base_name or ""  # for None PEFT would write the folder's path
    adapter.target_modules = sorted(adapter.target_modules)
    adapter.modules_to_save = sorted(set(adapter.modules_to_save))  # PEFT adds the head again on every load
    model.save_pretrained(finished, save_embedding_layers=False)
    (finished / RERANK_JSON).write_text(config.model_dump_json(indent=2) + "\n", "utf-8")
    (finished / "training.json").write_text(json.dumps(asdict(record)) + "\n", "utf-8")
    (finished / "training.svg").write_text(_plot(record), "utf-8")
    (finished / "README.md").write_text(_card(out.name, config, record, rank=adapter.r), "utf-8")
    finished.rename(out)


def _card(name: str, config: CheckpointConfig, record: TrainingRecord, *, rank: int) -> str:
    """Write a model card from the record of the run, with placeholders for what it does not contain."""
    settings = record.settings
    base_name = config.base.name if config.base else None
    base = _short(base_name) if base_name else "a local folder"
    with_base = "" if base_name else " --base FOLDER"
    layers = f", its first {config.base.layers} layers" if config.base and config.base.layers else ""
    result = (
        f"The mean loss of five steps went from {mean(record.loss[:5]):.3f} to {mean(record.loss[-5:]):.3f}, "
        f"over {record.tokens:,} tokens."
    )
    if record.validation:
        first, best = next(iter(record.validation.values())), record.validation[record.best_step]
        names = ", ".join(settings["validation"])
        result += (
            f"\nOn {record.validation_groups} groups held out from training ({names}) nDCG@10 went from {first:.4f},"
            f"\nat the first validation, to {best:.4f} after step {record.best_step} of {record.steps}: these weights."
        )
    pooled = "the last token's hidden state" if config.pooling == "last" else "the mean of all hidden states"
    data = f"{', '.join(settings['data'])}: {record.groups} groups an epoch"
    rows = "\n".join(f"| {key} | `{value}` |" for key, value in settings.items() if value not in (None, [], ""))
    return f"""---
library_name: peft
pipeline_tag: text-ranking
tags: [reranker, mistral-rerank]
base_model: {base}
---

# {name}

A reranker: it estimates the probability that a passage answers a question.

- Base: {base}{layers}, with LoRA matrices of rank {rank} and a binary head on {pooled}
- Data: {data}. *Licences and sources: to be filled in.*
- Input: `{config.template!r}`, trained on up to {settings["max_length"]} tokens
- Output: a logit; its sigmoid is a probability, which means something after `mistral-rerank calibrate`

## Use

```
mistral-rerank rank QUESTION FILE --model {name}{with_base}
mistral-rerank evaluate --data SET --model {name}{with_base} --out report
```

## Training

{result}

![loss and nDCG@10](training.svg)

| setting | value |
|---|---|
{rows}

## Evaluation, bias, safety

*To be filled in: the results of `mistral-rerank evaluate` on data of the domain, and whom its errors would hurt.*
"""


def _short(name: str) -> str:
    """Give the name of a local folder without its parents, and any other name unchanged."""
    return Path(name).name if Path(name).is_dir() else name


def _plot(record: TrainingRecord) -> str:
    """Draw the smoothed loss and the validations over the steps."""
    window = max(1, len(record.loss) // PLOT_POINTS)
    starts = range(0, len(record.loss), window)
    series = {"loss": [(float(i + 1), mean(record.loss[i : i + window])) for i in starts]}
    if record.validation:
        series["nDCG@10"] = [(float(step), value) for step, value in record.validation.items()]
    return line_plot(series, title="Loss and nDCG@10 over the steps", x_name="step", y_name="").svg
