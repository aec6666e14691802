"""LoRA fine-tuning of a base into a reranker checkpoint, on transformers' Trainer and PEFT.

A step takes whole groups. Their pairs lie in rows without padding, in which what several pairs begin with (the
question, or the passage, as the template has it) is computed once; the last token's hidden state is pooled, the
head is in float32, and the logits are put back in order before the loss.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field

from mistral_rerank.errors import (
    CheckpointError,
    InputTooLongError,
    InvalidInputError,
    MissingDependencyError,
    SettingsError,
)
from mistral_rerank.files import claim
from mistral_rerank.local.attention import PACKED_ATTENTION, register
from mistral_rerank.local.backbone import is_known
from mistral_rerank.local.bases import PretrainedBase, WheelBase, base_folder, independent, named_base
from mistral_rerank.local.checkpoint import (
    Calibration,
    Checkpoint,
    CheckpointConfig,
    find_checkpoint,
    load_adapter,
    load_classifier,
    load_tokenizer,
    read_config,
)
from mistral_rerank.local.device import multiplies_bfloat16, pick_device
from mistral_rerank.local.nf4 import import_bitsandbytes
from mistral_rerank.local.tokens import PairTokenizer
from mistral_rerank.prompts import DEFAULT_TEMPLATE, Prompt
from mistral_rerank.training.losses import Loss
from mistral_rerank.training.memory import estimate
from mistral_rerank.training.record import TrainingRecord, write_checkpoint
from mistral_rerank.training.sources import Source
from mistral_rerank.training.trainer import (
    VALIDATION_METRIC,
    GroupCollator,
    GroupTrainer,
    LossProgress,
    ValidateAtTheEnd,
    group_logits,
)

try:
    import transformers
    from peft import LoraConfig, get_peft_model
    from peft.helpers import disable_input_dtype_casting
except ImportError as error:
    raise MissingDependencyError.of("train", error) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from peft import PeftModel

    from mistral_rerank.local.reading import Reading
    from mistral_rerank.training.groups import Group

logger = logging.getLogger(__name__)

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TrainSettings(BaseModel):
    """Every choice of a training run; the same settings and data give the same weights on one thread."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | None = Field(default=None, description="a folder, a hub id, or smollm2-135m")
    layers: int | None = Field(default=None, ge=1, description="keep only the first N layers of the base")
    init: str | None = Field(default=None, description="instead of a base: go on from this adapter, or mini")
    data: tuple[Source, ...] = Field(min_length=1, description="data sets, with their caps and weights")
    validation: tuple[Source, ...] = Field(default=(), description="data sets ranked after every save_steps")
    patience: int | None = Field(default=None, ge=1, description="validations in a row without a better one, to stop")
    loss: Loss = Field(default="bce+infonce", description=" | ".join(get_args(Loss)))
    distill: float = Field(default=1.0, ge=0, description="weight of the teacher's order, in groups that hold one")
    questions: int = Field(default=1, ge=1, description="questions of a group, all compared with its passages")
    negatives: int = Field(default=4, ge=0, description="passages of a group judged 0, or else from BM25")
    random_negatives: int = Field(default=1, ge=0, description="random negatives in a group")
    max_length: int = Field(default=512, ge=16, description="tokens of a pair while training")
    template: str | None = Field(default=None, description="the prompt; None for NVIDIA's, or that of `init`")
    bidirectional: bool = Field(default=False, description="tokens look ahead too, and the mean of all is pooled")
    frozen_layers: int = Field(default=0, ge=0, description="lower layers without LoRA: no backward pass there")
    lora_rank: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(default=0.01, ge=0)
    epochs: float = Field(default=1.0, gt=0)
    groups_per_step: int = Field(default=32, ge=1, description="groups of one optimizer step")
    groups_per_forward: int = Field(default=4, ge=1, description="groups whose activations are held at once")
    batch_tokens: int = Field(default=4096, ge=1, description="tokens of one row")
    four_bit: bool = Field(default=False, description="keep the base in 4 bits while training (QLoRA)")
    activation_checkpointing: bool = Field(default=False, description="less memory for a third more time")
    save_steps: int = Field(default=50, ge=1, description="optimizer steps between resumable checkpoints")
    device: str = "auto"
    seed: int = 0


def finetune(settings: TrainSettings, out: Path, *, notice: Callable[[str], None] = logger.info) -> Path:
    """Train and write a checkpoint folder.

    A run that was stopped goes on from its last saved step when it is started again with the same settings;
    its state lies in `<out>.training` until the checkpoint is complete.

    Args:
        settings: what to train on what.
        out: the folder to write; it must not exist yet.
        notice: is told, before anything is loaded, how much memory the run will take.

    Returns:
        `out`: a PEFT folder with `rerank.json`, a model card, and `training.json` and `training.svg` (settings,
        counts, the loss of every step). With validation it holds the weights of the best one.

    Raises:
        SettingsError: `out` exists, or holds the state of a run with other settings.
        InvalidInputError: a data set cannot be read.

    """
    if out.exists():
        raise SettingsError(f"{out} exists; give another folder, or remove it")
    state = out.with_name(out.name + ".training")
    groups, validation = _training_groups(settings), _validation_groups(settings)
    _check_apart(groups, validation)
    device = pick_device(settings.device)
    bf16 = multiplies_bfloat16(device)
    init = None if settings.init is None else find_checkpoint(settings.init)
    config, base = _start(settings, init)
    arguments = _arguments(settings, state, bf16=bf16, cpu=device.type == "cpu")
    folder = base_folder(base)
    shape = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    lora = _lora(settings, init, base.layers or shape.num_hidden_layers)
    tokenizer = PairTokenizer(
        load_tokenizer(Checkpoint(folder, config, None)),
        Prompt(config.template),
        append_eos=config.append_eos,
        max_length=settings.max_length,
    )
    _check_questions(tokenizer, [*groups, *validation])
    collator = GroupCollator(tokenizer, settings.batch_tokens, config.reading)
    claim(state / "settings.json", settings.model_dump(mode="json"), holder=state)
    transformers.set_seed(settings.seed)
    memory = estimate(
        shape,
        layers=base.layers,
        adapted_layers=len(lora.layers_to_transform or range(base.layers or shape.num_hidden_layers)),
        lora_rank=lora.r,
        tokens=_most_tokens(settings, groups, collator),
        bytes_of_weight=2 if bf16 else 4,
        activation_checkpointing=settings.activation_checkpointing,
        four_bit=settings.four_bit,
    )
    notice(f"memory: {memory}")
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = _trainable(
        folder,
        base.layers,
        init or lora,
        reading=config.reading,
        dtype=dtype,
        quantization=_four_bits(dtype) if settings.four_bit else None,
        device=device,
    )
    trainer = GroupTrainer(
        model=model,
        args=arguments,
        train_dataset=groups,
        eval_dataset=validation or None,
        data_collator=collator,
        loss=settings.loss,
        distill=settings.distill,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(LossProgress())
    trainer.add_callback(ValidateAtTheEnd())
    if settings.patience is not None:
        trainer.add_callback(transformers.EarlyStoppingCallback(settings.patience))
    saved = _last_whole_state(state)
    with disable_input_dtype_casting(model, active=bf16):  # autocast casts the small adapter, not the activations
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
    if trainer.is_world_process_zero():
        record = TrainingRecord.of(settings, trainer.state, groups=len(groups), validation_groups=len(validation))
        write_checkpoint(trainer.accelerator.unwrap_model(trainer.model), config, record, beside=state, out=out)
        shutil.rmtree(state)
    trainer.accelerator.wait_for_everyone()
    return out


def _start(settings: TrainSettings, init: Path | None) -> tuple[CheckpointConfig, PretrainedBase | WheelBase]:
    """Give what the new checkpoint says of itself, and its base; those of `init`, where there is one."""
    if (init is None) == (settings.base is None):
        raise SettingsError("give a base to train on, or init, a checkpoint to go on from; one of them")
    if init is None:
        base = named_base(str(settings.base), layers=settings.layers)
        both_ways = {"attention": "bidirectional", "pooling": "mean"} if settings.bidirectional else {}
        return CheckpointConfig(template=settings.template or DEFAULT_TEMPLATE, base=base, **both_ways), base
    before = read_config(init)
    if before.base is None:
        raise SettingsError(f"{settings.init} is a whole model; give it as the base, or give an adapter as init")
    kept = {"template": before.template, "layers": before.base.layers, "bidirectional": before.reading.bidirectional}
    for name, value in kept.items():
        if getattr(settings, name) not in (None, False, value):
            raise SettingsError(f"{settings.init} was trained with {name} {value!r}; leave {name} out")
    base = independent(before.base, relative_to=init)
    return before.model_copy(update={"calibration": Calibration(), "base": base}), base


def _lora(settings: TrainSettings, init: Path | None, layers: int) -> LoraConfig:
    """Give the adapter's form: that of `init`, or what the settings say."""
    if init is not None:
        if given := {
            name for name in settings.model_fields_set if name.startswith("lora_") or name == "frozen_layers"
        }:
            raise SettingsError(
                f"{settings.init} has its LoRA matrices already; leave {', '.join(sorted(given))} out"
            )
        return LoraConfig.from_pretrained(init)
    if settings.frozen_layers >= layers:
        raise SettingsError(
            f"frozen_layers is {settings.frozen_layers}, and there are {layers} layers; leave one to train"
        )
    return LoraConfig(
        task_type="SEQ_CLS",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LORA_TARGETS,
        layers_to_transform=list(range(settings.frozen_layers, layers)),
    )


def _check_questions(tokenizer: PairTokenizer, groups: Sequence[Group]) -> None:
    """See before the first step that every question leaves room for a passage."""
    questions = list(dict.fromkeys(query for group in groups for query in group.queries))
    try:
        tokenizer.encode([(query, "x") for query in questions])
    except InputTooLongError as error:
        raise InvalidInputError(f"of {len(questions)} questions to train on, {error}") from error


def _most_tokens(settings: TrainSettings, groups: Sequence[Group], collator: GroupCollator) -> int:
    """Count the tokens of the longest groups that one forward can hold."""

    def characters(group: Group) -> int:
        return sum(map(len, group.passages)) + len(group.passages) * sum(map(len, group.queries))

    longest = sorted(groups, key=characters, reverse=True)[: settings.groups_per_forward]
    return sum(packed.ids.numel() for packed in collator(longest)["packs"])


def _four_bits(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """Give QLoRA's quantization, arXiv 2305.14314: NF4, with the scales quantized too."""
    import_bitsandbytes()
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score"],
    )


def _trainable(
    base: Path,
    layers: int | None,
    adapter: Path | LoraConfig,
    *,
    reading: Reading,
    dtype: torch.dtype,
    quantization: transformers.BitsAndBytesConfig | None,
    device: torch.device,
) -> PeftModel:
    """Give the base under a LoRA adapter, a saved or a new one, and with `group_logits` as its forward."""
    classifier = load_classifier(
        base, dtype=dtype, layers=layers, new_head=True, quantization=quantization, device=device
    )
    if not is_known(classifier.base_model):
        raise CheckpointError(f"{base} is a {classifier.config.model_type}; a Mistral or a Llama can be trained")
    classifier.score.float()
    torch.nn.init.zeros_(classifier.score.weight)  # every logit starts at 0, so no passage has a head start
    register()
    classifier.base_model.set_attn_implementation(PACKED_ATTENTION)
    classifier.forward = partial(group_logits, classifier, reading)  # under the Trainer's own wrappers: autocast, DDP
    if isinstance(adapter, LoraConfig):
        return get_peft_model(classifier, adapter)
    adapted = load_adapter(classifier, adapter, trainable=True)
    adapted.peft_config["default"].base_model_name_or_path = str(base)  # PEFT would look for a name on the hub
    return adapted


def _last_whole_state(state: Path) -> Path | None:
    """Find the last state that was saved to its end: the Trainer writes its own record last."""
    steps = {int(folder.name.split("-")[1]): folder for folder in state.glob("checkpoint-*")}
    whole = [step for step, folder in steps.items() if (folder / "trainer_state.json").is_file()]
    return steps[max(whole)] if whole else None


def _training_groups(settings: TrainSettings) -> list[Group]:
    """Give what one epoch sees, in its order."""
    groups = [group for source in settings.data for group in _groups(source, settings, "train")]
    shapes = {(len(group.passages), group.teacher is not None) for group in groups}
    if len(shapes) != 1 and settings.groups_per_forward > 1:
        raise SettingsError(
            f"groups that share a forward need one number of passages, and a teacher in all or none; "
            f"found {sorted(shapes)}. Set groups_per_forward to 1"
        )
    random.Random(settings.seed).shuffle(groups)  # noqa: S311 - sampling, not security
    return groups


def _validation_groups(settings: TrainSettings) -> list[Group]:
    if settings.patience is not None and not settings.validation:
        raise SettingsError("patience counts validations; give a data set for validation, or leave patience out")
    splits = "dev", "validation", "test"
    return [group for source in settings.validation for group in _groups(source, settings, *splits)]


def _check_apart(groups: Sequence[Group], validation: Sequence[Group]) -> None:
    """See that validation says something of questions that were not trained on."""
    trained = {query for group in groups for query in group.queries}
    if validation and trained.issuperset(query for group in validation for query in group.queries):
        raise SettingsError(
            "every question of the validation is trained on; give another data set, or a folder with a split for each"
        )


def _groups(source: Source, settings: TrainSettings, *splits: str) -> list[Group]:
    return source.groups(
        *splits,
        questions=settings.questions,
        negatives=settings.negatives,
        random_negatives=settings.random_negatives,
        seed=settings.seed,
    )


def _arguments(settings: TrainSettings, state: Path, *, bf16: bool, cpu: bool) -> transformers.TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    if not cpu and processes == 1 and torch.cuda.device_count() > 1:
        raise SettingsError(
            "there are several GPUs: start with torchrun to use them all, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    at_once = settings.groups_per_forward * processes
    if settings.groups_per_step % at_once:
        raise SettingsError(
            f"groups_per_step {settings.groups_per_step} is no multiple of {at_once}: "
            f"groups_per_forward {settings.groups_per_forward} x {processes} processes"
        )
    return transformers.TrainingArguments(
        output_dir=str(state),
        per_device_train_batch_size=settings.groups_per_forward,
        gradient_accumulation_steps=settings.groups_per_step // at_once,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        bf16=bf16,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # none of them changes
        activation_checkpointing=settings.activation_checkpointing,
        save_steps=settings.save_steps,
        eval_strategy="steps" if settings.validation else "no",
        eval_steps=settings.save_steps,
        load_best_model_at_end=bool(settings.validation),
        metric_for_best_model=VALIDATION_METRIC if settings.validation else None,
        greater_is_better=True if settings.validation else None,
        restore_callback_states_from_checkpoint=True,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        seed=settings.seed,
    )
