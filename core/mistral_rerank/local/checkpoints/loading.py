"""Loading: finding a checkpoint and its base, and making a tokenizer and a model of them.

Three kinds of checkpoints are read, as transformers and PEFT write them, from safetensors and without remote code:

    model.safetensors, config.json         a whole AutoModelForSequenceClassification with one label
    adapter_model.safetensors, ...         a LoRA adapter and head; its base is somewhere else
    "mini"                                 such an adapter, inside this package
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError, MissingDependencyError, SettingsError
from mistral_rerank.local.checkpoints.bases import base_folder, pretrained_folder
from mistral_rerank.local.checkpoints.config import (
    RERANK_JSON,
    CheckpointConfig,
    PretrainedBase,
    mini_folder,
    read_config,
)
from mistral_rerank.local.checkpoints.quiet import quiet
from mistral_rerank.local.checkpoints.trust import (
    check_tokenizer,
    check_weights,
    read_lora_config,
    read_model_config,
    unusable,
    weight_files,
    weight_map,
)
from mistral_rerank.local.checkpoints.wheels import sha256_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

PEFT_BASE = "adapter_config.json", "base_model_name_or_path"
MINI = "mini"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder whose configuration is read and whose weights are not loaded."""

    folder: Path
    config: CheckpointConfig
    base: Path | None
    """The folder of the base under an adapter; None for a whole model."""

    def weights_checksum(self) -> str:
        """Return the SHA-256 of the checksums of all files that a model and its tokenizer are loaded from."""
        digest = hashlib.sha256()
        for folder in filter(None, (self.folder, self.base)):
            for file in sorted(folder.rglob("*")):
                if file.suffix in (".json", ".safetensors"):
                    digest.update(f"{file.relative_to(folder)} {sha256_of(file)}\n".encode())
        return digest.hexdigest()

    @property
    def layers(self) -> int | None:
        """Number of layers of the base that are used; None for all."""
        return self.config.base.layers if self.config.base else None


def find_checkpoint(model: str) -> Path:
    """Return the folder of "mini", which is always the built-in model, of a path, or of a hub id.

    Raises:
        CheckpointError: there is none.

    """
    return mini_folder() if model == MINI else pretrained_folder(model)


def open_checkpoint(model: str, *, base: str | None = None) -> Checkpoint:
    """Find a checkpoint and its base; download what is not on this machine.

    Args:
        model: "mini", a checkpoint folder or a hub id.
        base: replaces the base that an adapter names: a folder, a hub id or a known wheel's name.

    Raises:
        CheckpointError: something is missing or not supported.
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
    return Checkpoint(folder, config, base_folder(named, override=base, checkpoint=folder, key=f"{file}: {key}"))


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside the checkpoint, else that of its base.

    Raises:
        CheckpointError: there is none, or it is not usable.

    """
    transformers = _transformers()
    has_tokenizer = (checkpoint.folder / "tokenizer.json").is_file()
    folder = checkpoint.folder if has_tokenizer or checkpoint.base is None else checkpoint.base
    check_tokenizer(folder)
    has_config = (folder / "config.json").is_file()
    config = read_model_config(folder) if has_config else transformers.PreTrainedConfig()
    with quiet(), unusable(f"{folder}: its tokenizer"):
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the whole model onto the CPU: backbone in `dtype`, `score` head in float32, adapter merged.

    An adapter is merged in float32 and then rounded to `dtype`, one linear after the other to save memory.

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
    """Cast weights but no buffers: the rotary frequencies stay float32, as in transformers."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _stored_head(folder: Path) -> torch.Tensor:
    """Read the `score` head from its file, in float32."""
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
        dtype: of the weights; "auto" keeps the stored one.
        layers: the number of layers to keep, from the first; None for all.
        new_head: whether a missing `score` head is initialized with small random numbers.
        quantization: of the linears; None for none.
        device: of quantized weights, which cannot always be moved; other weights are loaded onto the CPU.

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
    """Describe a checkpoint and how it runs on this machine, for display."""
    from mistral_rerank.local.device import pick_device, pick_dtype
    from mistral_rerank.local.model.early_exit import read_early_exit_config
    from mistral_rerank.local.model.quantization import check_quantization

    checkpoint = open_checkpoint(model, base=base)
    config, torch_device = checkpoint.config, pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    check_quantization(quantization, torch_device, torch_dtype)
    with quiet():
        model_config = read_model_config(checkpoint.base or checkpoint.folder, layers=checkpoint.layers)
    if checkpoint.base is not None:
        read_lora_config(checkpoint.folder)
    number_formats = filter(None, (quantization, str(torch_dtype).removeprefix("torch.")))
    return {
        "model": f"{model} ({checkpoint.folder})",
        "base": "none, a whole model" if checkpoint.base is None else str(checkpoint.base),
        "architecture": f"{model_config.model_type}, {model_config.num_hidden_layers} layers of width "
        f"{model_config.hidden_size}",
        "template": config.template + ("<end token>" if config.append_eos else ""),
        "pooling": f"{'last' if config.pooling == 'last' else 'mean of every'} token, {config.attention} attention",
        "longest input": f"{config.max_length} tokens",
        "calibration": str(config.calibration),
        "threshold": config.calibration.described_threshold,
        "early exit": str(read_early_exit_config(checkpoint.folder) or "none"),
        "runs on": f"{torch_device} in {' and '.join(number_formats)}",
    }


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    return transformers
