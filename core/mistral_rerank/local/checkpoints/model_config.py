"""The configurations of models and adapters, read without the keys that refer to code or other files."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.checkpoints.families import find_family
from mistral_rerank.local.checkpoints.trust import COUNT_LIMIT, read_json, tensor_shapes, unusable, weight_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

NUMBER_LIMIT = 2**40

REFUSED_IN_CONFIG = {
    "auto_map": "remote code is never run",
    "quantization_config": "give weights that are not quantized, and choose `quantization` when they are opened",
    "compression_config": "give weights that are not compressed",
    "transformers_weights": "weights are read from model.safetensors or its shards",
    "configuration_files": "config.json alone is read",
}
DROPPED = {
    *("num_labels", "id2label", "label2id", "problem_type"),  # one label is always loaded
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "torchscript"),
}
WITHOUT_CODE = {"llama_bidirec": "llama", "ministral3_bidirec": "ministral3"}
"""Model types of remote code that are read as others, with the attention and pooling of their family."""
COUNTS = re.compile(r"num_\w+|n_(layers?|heads?)")
NEEDED = {"num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
STRING_KEYS = {"_name_or_path", "architectures", "dtype", "model_name", "model_type", "tokenizer_class", "torch_dtype"}
"""Keys of config.json whose strings transformers only compares with known names."""
ROPE = ("rope_parameters", "rope_scaling")

LORA_FIELDS: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "modules_to_save": list,
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "trainable_token_indices": (list, dict),
    "target_parameters": list,
    "init_lora_weights": (bool, str),
    "bias": str,
    "task_type": str,
    "fan_in_fan_out": bool,
    "lora_bias": bool,
    "use_dora": bool,
    "use_rslora": bool,
}
IGNORED_IN_ADAPTER = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version"),
    *("revision", "runtime_config", "qalora_group_size", "loftq_config", "eva_config", "corda_config"),
}
"""Fields about the training of an adapter, or without effect when it is applied."""
PATTERN = re.compile(r"[\w.^$\\|()\[\]-]*", re.ASCII)
"""A module's name, or a regular expression without repetition, which matches in linear time."""


def read_model_config(folder: Path, *, layers: int | None = None) -> PreTrainedConfig:
    """Read config.json as transformers' config of a one-label classifier, without keys that refer to other files.

    Args:
        folder: a checkpoint or a base.
        layers: the number of layers to use, from the first; None for all.

    Raises:
        CheckpointError: a key is rejected, a number is too large, or the architecture is unknown.

    """
    from transformers import AutoConfig

    file = folder / "config.json"
    raw = read_json(file)
    for key, reason in REFUSED_IN_CONFIG.items():
        if raw.get(key) is not None and not (key == "auto_map" and find_family(folder, raw.get("architectures"))):
            raise CheckpointError(f"{file}: {key} is refused; {reason}")
    raw["model_type"] = WITHOUT_CODE.get(str(raw.get("model_type")), raw.get("model_type"))
    with unusable(f"{file}: model_type {_short(raw.get('model_type'))}"):
        known = AutoConfig.for_model(raw["model_type"])
        string_keys = STRING_KEYS | known.to_dict().keys()
    with unusable(file):
        _check_numbers(file, raw)
        kept = {
            key: value
            for key, value in raw.items()
            if key not in DROPPED and (key in string_keys or key in ROPE or not _has_strings(value))
        }
        kept |= {"num_labels": 1}
        whole = type(known).from_dict(kept)
    if layers is None:
        return whole
    if layers > whole.num_hidden_layers:
        raise CheckpointError(f"{folder} has {whole.num_hidden_layers} layers, {layers} were asked for")
    if isinstance(types := kept.get("layer_types"), list):
        kept |= {"layer_types": types[:layers]}
    with unusable(file):
        return type(known).from_dict(kept | {"num_hidden_layers": layers})


def is_encoder(folder: Path) -> bool:
    """Tell whether a checkpoint is an encoder with a classifier, as transformers knows them.

    Raises:
        CheckpointError: as `read_model_config`.

    """
    import torch
    from transformers import AutoModelForSequenceClassification

    architectures = read_json(folder / "config.json").get("architectures")
    if not str(architectures).endswith("ForSequenceClassification']"):
        return False
    config = read_model_config(folder)
    if getattr(config, "is_encoder_decoder", False):
        return False
    with unusable(folder / "config.json"), torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return not hasattr(model, "score")  # the head of decoders


def check_weights(folder: Path, config: PreTrainedConfig, model_class: Any) -> type[PreTrainedModel]:
    """Check that the weights are safetensors in the folder, and that config.json does not describe more than they hold.

    Args:
        folder: of the weights.
        config: as `read_model_config` returns it.
        model_class: the class of transformers that will be loaded, such as `AutoModel`.

    Returns:
        The class of the architecture.

    Raises:
        CheckpointError: a file is missing, truncated or outside the folder, or config.json describes more weights.

    """
    import torch

    files = weight_files(folder, getattr(config, "num_hidden_layers", COUNT_LIMIT))
    stored = sum(math.prod(shape) for file in files for shape in tensor_shapes(file).values())
    with unusable(folder / "config.json"), torch.device("meta"):
        empty = model_class.from_config(config, trust_remote_code=False)
        described = sum(weight.numel() for name, weight in empty.named_parameters() if not name.startswith("score."))
    if described > stored:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {described:,} weights, and the safetensors files hold {stored:,}"
        )
    return type(empty)


def read_lora_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json as PEFT's LoraConfig, as `read_lora_fields`."""
    from peft import LoraConfig

    fields = read_lora_fields(folder)
    with unusable(folder / "adapter_config.json"):
        return LoraConfig(**fields)


def read_lora_fields(folder: Path) -> dict[str, Any]:
    """Read the fields of `LORA_FIELDS` from adapter_config.json, without keys that refer to other files.

    Raises:
        CheckpointError: it is not a LoRA adapter, its weights are not safetensors, or a key is not supported.

    """
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(
            f"{folder} holds no adapter_model.safetensors; other formats are not read. Convert an "
            "adapter_model.bin with: mistral-rerank convert"
        )
    raw = read_json(file)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {_short(raw.get('peft_type'))}; 'LORA' is read")
    largest = max((size for shape in tensor_shapes(weights).values() for size in shape), default=0)
    fields: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in LORA_FIELDS:
            if value and key not in IGNORED_IN_ADAPTER:
                raise CheckpointError(f"{file}: {key} is {_short(value)}, which is not supported")
            continue
        if value is None:
            continue
        if not isinstance(value, LORA_FIELDS[key]) or (isinstance(value, bool) and LORA_FIELDS[key] is int):
            raise CheckpointError(f"{file}: {key} is {_short(value)}, of the wrong type")
        for text in _strings(value):
            if not PATTERN.fullmatch(text):
                raise CheckpointError(f"{file}: {key} holds {_short(text)}; give names of modules")
        fields[key] = value
    _check_numbers(file, fields)
    ranks = [fields.get("r"), *fields.get("rank_pattern", {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= largest for rank in ranks):
        raise CheckpointError(f"{file}: r or rank_pattern is over what {weights.name} holds")
    return fields


def _check_numbers(file: Path, content: Mapping[str, Any], path: str = "") -> None:
    for key, value in content.items():
        full_key = f"{path}{key}"
        if isinstance(value, dict):
            _check_numbers(file, value, f"{full_key}.")
        elif isinstance(value, int | float):
            is_count = COUNTS.fullmatch(key) is not None
            least, most = (int(key in NEEDED), COUNT_LIMIT) if is_count else (-NUMBER_LIMIT, NUMBER_LIMIT)
            if not least <= value <= most:
                raise CheckpointError(f"{file}: {full_key} is {_short(value)}; {least} to {most} is read")


def _has_strings(value: object) -> bool:
    return next(_strings(value), None) is not None


def _strings(value: object) -> Iterator[str]:
    """Yield the strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
