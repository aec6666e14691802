"""LoRA fine-tuning of a base into a reranker checkpoint, on transformers' Trainer and PEFT.

A step takes whole groups. Their pairs are packed into rows without padding, and their common prefixes (question or
passage, as the template has it) are computed once. The head is in float32.
"""

from __future__ import annotations

import inspect
import logging
import os
import random
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mistral_rerank.data_files.atomic import check_resume_settings
from mistral_rerank.errors import (
    CheckpointError,
    InputTooLongError,
    InvalidInputError,
    MissingDependencyError,
    SettingsError,
)
from mistral_rerank.local.checkpoints.bases import base_folder
from mistral_rerank.local.checkpoints.config import (
    Calibration,
    CheckpointConfig,
    PretrainedBase,
    named_base,
)
from mistral_rerank.local.checkpoints.detection import read_config
from mistral_rerank.local.checkpoints.loading import (
    Checkpoint,
    find_checkpoint,
    load_adapter,
    load_classifier,
    load_tokenizer,
)
from mistral_rerank.local.checkpoints.model_config import read_lora_config, read_model_config
from mistral_rerank.local.checkpoints.trust import inner_folder
from mistral_rerank.local.device import multiplies_bfloat16, pick_device
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.attention import PACKED_ATTENTION, register
from mistral_rerank.local.model.quantization import import_bitsandbytes
from mistral_rerank.local.model.rotary import forget_lengths
from mistral_rerank.local.model.transformer import KNOWN_NAMES, is_known
from mistral_rerank.templates import DEFAULT_TEMPLATE
from mistral_rerank.training.memory import estimate
from mistral_rerank.training.mining import load_groups
from mistral_rerank.training.model_card import TrainingRecord, write_checkpoint
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

    from mistral_rerank.training.groups import Group
    from mistral_rerank.training.settings import TrainSettings

logger = logging.getLogger(__name__)

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def finetune(settings: TrainSettings, out: Path, *, notice: Callable[[str], None] = logger.info) -> Path:
    """Train and write a checkpoint folder.

    A stopped run resumes from its last saved step when it is started again with the same settings. Its state is in
    `<out>.training` until the checkpoint is complete.

    Args:
        settings: of the run.
        out: the folder to write; it must not exist yet.
        notice: receives the memory estimate before anything is loaded, and the progress if there is no terminal.

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
    groups, validation = _load_data(settings)
    device = pick_device(settings.device)
    bf16 = multiplies_bfloat16(device)
    arguments = _arguments(settings, state, bf16=bf16, cpu=device.type == "cpu")
    init = None if settings.init is None else find_checkpoint(settings.init)
    config, base = _start(settings, init)
    model_config = read_model_config(base, layers=config.base.layers if config.base else None)
    lora = _lora(settings, init, model_config.num_hidden_layers)
    tokenizer = PairTokenizer(
        load_tokenizer(Checkpoint(base, config, None)),
        config.prompt,
        add_special_tokens=config.add_special_tokens,
        append_eos=config.append_eos,
        max_length=settings.max_length,
    )
    _check_questions(tokenizer, [*groups, *validation])
    collator = GroupCollator(tokenizer, settings.batch_tokens, config.pooling_config, config=model_config)
    check_resume_settings(state / "settings.json", settings.model_dump(mode="json"), holder=state)
    transformers.set_seed(settings.seed)
    memory = estimate(
        model_config,
        adapted_layers=len(lora.layers_to_transform or range(model_config.num_hidden_layers)),
        lora_rank=lora.r,
        tokens=_most_tokens(settings, groups, collator),
        weight_bytes=2 if bf16 else 4,
        activation_checkpointing=settings.activation_checkpointing,
        four_bit=settings.four_bit,
    )
    notice(f"memory: {memory}")
    model = _trainable(base, config, init or lora, bf16=bf16, four_bit=settings.four_bit, device=device)
    trainer = GroupTrainer(
        model=model,
        args=arguments,
        train_dataset=groups,
        eval_dataset=validation or None,
        data_collator=collator,
        loss=settings.loss,
        distill=settings.distill,
    )
    trainer.remove_callback(transformers.ProgressCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(LossProgress(notice))
    trainer.add_callback(ValidateAtTheEnd())
    if settings.patience is not None:
        trainer.add_callback(transformers.EarlyStoppingCallback(settings.patience))
    with disable_input_dtype_casting(model, active=bf16):  # autocast casts the small adapter, not the activations
        trainer.train(resume_from_checkpoint=_last_complete_state(state))
    if trainer.is_world_process_zero():
        record = TrainingRecord.of(settings, trainer.state, groups=len(groups), validation_groups=len(validation))
        write_checkpoint(trainer.accelerator.unwrap_model(trainer.model), config, record, scratch=state, out=out)
        shutil.rmtree(state)
    trainer.accelerator.wait_for_everyone()
    return out


def _start(settings: TrainSettings, init: Path | None) -> tuple[CheckpointConfig, Path]:
    """Give the configuration of the new checkpoint, taken from `init` if it is given, and the folder of its base."""
    if init is None:
        if settings.base is None:
            raise SettingsError("give a base to train on, or init, a checkpoint to continue from")
        both_ways = {"attention": "bidirectional", "pooling": "mean"} if settings.bidirectional else {}
        base = named_base(settings.base, layers=settings.layers)
        config = CheckpointConfig(template=settings.template or DEFAULT_TEMPLATE, base=base, **both_ways)
        return config, base_folder(base, override=settings.base)
    config = read_config(init)
    if config.base is None:
        raise SettingsError(f"{settings.init} is a whole model; give it as the base, or give an adapter as init")
    inherited = {
        "template": config.template,
        "layers": config.base.layers,
        "bidirectional": config.pooling_config.bidirectional,
    }
    for name, value in inherited.items():
        if getattr(settings, name) not in (None, False, value):
            raise SettingsError(f"{settings.init} was trained with {name} {value!r}; leave {name} out")
    folder = base_folder(config.base, override=settings.base, checkpoint=init)
    base = config.base
    if settings.base is not None:
        base = named_base(settings.base, layers=base.layers)
    elif isinstance(base, PretrainedBase) and base.name is not None and inner_folder(init, base.name) is not None:
        base = base.model_copy(update={"name": None})  # inside `init`, which the new checkpoint cannot name
    return config.model_copy(update={"calibration": Calibration(), "base": base}), folder


def _lora(settings: TrainSettings, init: Path | None, layers: int) -> LoraConfig:
    """Give the LoRA configuration of `init`, or of the settings."""
    if init is not None:
        if given := {name for name in settings.model_fields_set if name.startswith("lora_") or name == "frozen_layers"}:
            raise SettingsError(f"{settings.init} has its LoRA matrices already; leave {', '.join(sorted(given))} out")
        return read_lora_config(init)
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
    """Check before the first step that every question leaves room for a passage."""
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


def _trainable(
    base: Path,
    config: CheckpointConfig,
    adapter: Path | LoraConfig,
    *,
    bf16: bool,
    four_bit: bool,
    device: torch.device,
) -> PeftModel:
    """Give the base with a saved or new LoRA adapter, and `group_logits` as its forward."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    quantization = None
    if four_bit:
        import_bitsandbytes()
        quantization = transformers.BitsAndBytesConfig(  # that of QLoRA, arXiv 2305.14314
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["score"],
        )
    layers = config.base.layers if config.base else None
    classifier = load_classifier(
        base, dtype=dtype, layers=layers, new_head=True, quantization=quantization, device=device
    )
    if not is_known(classifier.base_model):
        raise CheckpointError(f"{base} is a {classifier.config.model_type}; a {KNOWN_NAMES} can be trained")
    classifier.score.float()
    torch.nn.init.zeros_(classifier.score.weight)  # every logit starts at 0, so no passage has a head start
    register()
    forget_lengths(classifier.base_model)
    classifier.base_model.set_attn_implementation(PACKED_ATTENTION)
    # under the wrappers of the Trainer: autocast, DDP
    classifier.forward = partial(group_logits, classifier, config.pooling_config)
    if isinstance(adapter, LoraConfig):
        return get_peft_model(classifier, adapter)
    adapted = load_adapter(classifier, adapter, trainable=True)
    adapted.peft_config["default"].base_model_name_or_path = str(base)  # PEFT would look for a name on the hub
    return adapted


def _last_complete_state(state: Path) -> str | None:
    """Give the last saved state that is complete: the Trainer writes its `trainer_state.json` last."""
    complete = [file.parent for file in state.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda folder: int(folder.name.split("-")[1]))) if complete else None


def _load_data(settings: TrainSettings) -> tuple[list[Group], list[Group]]:
    """Give the groups of an epoch, shuffled with the seed, and the validation groups."""
    if settings.patience is not None and not settings.validation:
        raise SettingsError("patience counts validations; give a data set for validation, or leave patience out")
    groups = [group for source in settings.data for group in load_groups(source, settings, "train")]
    shapes = {(len(group.passages), group.teacher is not None) for group in groups}
    if len(shapes) != 1 and settings.groups_per_forward > 1:
        raise SettingsError(
            f"groups that share a forward need one number of passages, and a teacher in all or none; "
            f"found {sorted(shapes)}. Set groups_per_forward to 1"
        )
    random.Random(settings.seed).shuffle(groups)  # noqa: S311 - sampling, not security
    splits = "dev", "validation", "test"
    validation = [group for source in settings.validation for group in load_groups(source, settings, *splits)]
    questions = {query for group in groups for query in group.queries}
    if validation and questions.issuperset(query for group in validation for query in group.queries):
        raise SettingsError(
            "every question of the validation is trained on; give another data set, or a folder with a split for each"
        )
    return groups, validation


def _arguments(settings: TrainSettings, state: Path, *, bf16: bool, cpu: bool) -> transformers.TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    if not cpu and processes == 1 and torch.cuda.device_count() > 1:
        raise SettingsError(
            "there are several GPUs: start with torchrun to use them all, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    concurrent_groups = settings.groups_per_forward * processes
    if settings.groups_per_step % concurrent_groups:
        raise SettingsError(
            f"groups_per_step {settings.groups_per_step} is no multiple of {concurrent_groups}: "
            f"groups_per_forward {settings.groups_per_forward} x {processes} processes"
        )
    # transformers 5.17 and older know activation checkpointing only by its old name, which newer ones deprecate
    is_renamed = "activation_checkpointing" in inspect.signature(transformers.TrainingArguments).parameters
    checkpointing = "activation_checkpointing" if is_renamed else "gradient_checkpointing"
    options: dict[str, Any] = {checkpointing: settings.activation_checkpointing}
    return transformers.TrainingArguments(
        output_dir=str(state),
        per_device_train_batch_size=settings.groups_per_forward,
        gradient_accumulation_steps=settings.groups_per_step // concurrent_groups,
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
        include_num_input_tokens_seen=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        seed=settings.seed,
        **options,
    )
