"""Plain checkpoints, such as mini: a Mistral decoder with a score head, whole or under a LoRA adapter.

They are read without transformers and PEFT, whose imports take longer than everything else until the first score. The
weights and the tokenizer are equal to the last bit. Whatever is unusual in a checkpoint, an error included, is left to
transformers: then these functions return None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import nn

from mistral_rerank.local.checkpoints.model_config import read_lora_fields
from mistral_rerank.local.checkpoints.stored_tensors import StoredTensor, stored_tensors
from mistral_rerank.local.checkpoints.trust import COUNT_LIMIT, TOKENIZER_LIMIT, read_json, tensor_shapes, unusable
from mistral_rerank.local.model.decoder import Decoder, DecoderConfig
from mistral_rerank.local.model.lora import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mistral_rerank.local.checkpoints.loading import Checkpoint

IGNORED = {
    *("_name_or_path", "architectures", "attention_dropout", "initializer_range", "tie_word_embeddings", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "id2label", "label2id", "problem_type"),
}
"""Keys of config.json without effect on the hidden states."""
PLAIN_LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "modules_to_save"} | {
    *("task_type", "init_lora_weights", "bias")
}
"""Fields of an adapter that may have a value; "none" is that of `bias`."""
TARGETS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
HEAD = "score.weight"
TOKENIZER_KEYS = {"backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class"}
TOKENS = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
VOCABULARY_LIMIT = 100_000
"""transformers may patch the regular expression of larger tokenizers of Mistral."""


@dataclass(frozen=True, slots=True)
class PlainModel:
    """What `load_model` returns of a plain checkpoint, without a forward of its own."""

    base_model: Decoder
    score: nn.Linear

    @property
    def config(self) -> DecoderConfig:
        """Of the backbone."""
        return self.base_model.config


@dataclass(frozen=True, slots=True)
class PlainTokenizer:
    """The part of a transformers tokenizer that pairs are tokenized with; a decoder has no token types."""

    backend_tokenizer: Tokenizer
    eos_token_id: int | None
    sep_token_id: None = None
    model_input_names: tuple[str, ...] = ("input_ids", "attention_mask")


def read_plain_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PlainModel | None:
    """Load a plain checkpoint as `load_model` does; None for any other.

    Raises:
        CheckpointError: weights are missing or not in safetensors.

    """
    folder = checkpoint.base or checkpoint.folder
    config = None if _reads_other_head(checkpoint) else _decoder_config(folder, checkpoint.layers)
    if config is None:
        return None
    with torch.device("meta"):
        decoder = Decoder(config)
    tensors: dict[str, Any] = dict(stored_tensors(folder, checkpoint.layers or COUNT_LIMIT))
    head: StoredTensor | None = tensors.pop(HEAD, None)
    low_ranks: Mapping[str, LowRank] | None = {}
    if checkpoint.base is not None:
        head = StoredTensor(checkpoint.folder / "adapter_model.safetensors", f"base_model.model.{HEAD}")
        low_ranks = _low_ranks(checkpoint.folder, config)
    if head is None or low_ranks is None or tensors.keys() != {f"model.{name}" for name in decoder.state_dict()}:
        return None
    state = {}
    for name, parameter in decoder.state_dict().items():
        stored = tensors[f"model.{name}"][...]
        low_rank = low_ranks.get(name)
        if stored.shape != parameter.shape or stored.dtype != getattr(torch, config.dtype):
            return None
        if low_rank is None:
            state[name] = stored.to(dtype)
        elif low_rank.shape != stored.shape:
            return None
        else:
            state[name] = low_rank.merge(stored, torch.empty(stored.shape, dtype=dtype))
            if not state[name].sum().isfinite():
                return None
    weight = head[...].float().clone()  # aligned memory: products depend on it in the last bit
    if weight.shape != (1, config.hidden_size):
        return None
    score = nn.Linear(config.hidden_size, 1, bias=False)
    score.weight.data = weight if checkpoint.base else weight / checkpoint.config.temperature
    decoder.load_state_dict(state, assign=True)
    return PlainModel(decoder, score)


def read_plain_tokenizer(checkpoint: Checkpoint) -> PlainTokenizer | None:
    """Load a tokenizer that transformers would read from tokenizer.json as it stands; None for any other.

    Raises:
        CheckpointError: the tokenizer is not usable.

    """
    has_tokenizer = (checkpoint.folder / "tokenizer.json").is_file()
    folder = checkpoint.folder if has_tokenizer or checkpoint.base is None else checkpoint.base
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    others = ("special_tokens_map.json", "added_tokens.json")
    if not (file.is_file() and settings_file.is_file()) or any((folder / name).exists() for name in others):
        return None
    settings = read_json(settings_file)
    extra = settings.get("extra_special_tokens", [])
    is_plain = settings.keys() <= TOKENIZER_KEYS | TOKENS | {"extra_special_tokens"} and isinstance(extra, list)
    if not is_plain or settings.get("tokenizer_class") != "TokenizersBackend":
        return None
    if file.stat().st_size > TOKENIZER_LIMIT:
        return None
    with unusable(f"{folder}: its tokenizer"):
        backend = Tokenizer.from_file(str(file))
    special = {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    named = {key: token for key, token in settings.items() if key in TOKENS and token is not None}
    if backend.get_vocab_size() > VOCABULARY_LIMIT or not all(token in special for token in [*named.values(), *extra]):
        return None
    return PlainTokenizer(backend, special[named["eos_token"]] if "eos_token" in named else None)


def _reads_other_head(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.head) or checkpoint.config.true_token is not None


def _decoder_config(folder: Path, layers: int | None) -> DecoderConfig | None:
    """Read config.json, with the number of layers that are used; None if it holds anything unusual."""
    content = read_json(folder / "config.json")
    fields = {key: value for key, value in content.items() if key not in IGNORED}
    try:
        config = DecoderConfig.model_validate(fields)
    except ValidationError:
        return None
    if layers is None:
        return config
    return config.model_copy(update={"num_hidden_layers": layers}) if layers <= config.num_hidden_layers else None


def _low_ranks(folder: Path, config: DecoderConfig) -> dict[str, LowRank] | None:
    """Return what a LoRA adapter adds to each weight, by name; None if the adapter does anything else."""
    fields = read_lora_fields(folder)
    targets, layers = (
        fields.get("target_modules"),
        fields.get("layers_to_transform", [*range(config.num_hidden_layers)]),
    )
    unusual = {key for key, value in fields.items() if value and key not in PLAIN_LORA}
    if unusual or fields.get("bias", "none") != "none" or not isinstance(fields.get("init_lora_weights", True), bool):
        return None
    if not isinstance(targets, list) or not set(targets) <= TARGETS.keys():
        return None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        return None
    if set(fields.get("modules_to_save", ())) - {"classifier"} != {"score"}:
        return None
    file = folder / "adapter_model.safetensors"
    names = [f"layers.{layer}.{TARGETS[target]}.{target}" for layer in layers for target in targets]
    parts = {(name, part): f"base_model.model.model.{name}.lora_{part}.weight" for name in names for part in "AB"}
    shapes = tensor_shapes(file)
    if shapes.keys() != {*parts.values(), f"base_model.model.{HEAD}"}:
        return None
    scaling = fields.get("lora_alpha", 8) / fields["r"]
    low_ranks = {}
    for name in names:
        down, up = (parts[name, part] for part in "AB")
        if len(shapes[down]) != 2 or len(shapes[up]) != 2 or not shapes[down][0] == shapes[up][1] == fields["r"]:
            return None
        low_ranks[f"{name}.weight"] = LowRank(StoredTensor(file, down)[...], StoredTensor(file, up)[...], scaling)
    return low_ranks
