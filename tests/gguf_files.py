"""Writes GGUF files as llama.cpp's converter does, from folders of tiny models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

ARCHITECTURES = {"qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3, "llama": MODEL_ARCH.LLAMA}


def write_gguf(
    folder: Path,
    file: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    head: torch.Tensor | None = None,
    labels: tuple[str, ...] = (),
    **metadata: Any,
) -> Path:
    """Write a language model's folder as a GGUF file.

    Args:
        folder: of transformers.
        file: to write.
        kind: of the matrices.
        head: rows of a classifier, in place of the vocabulary head, with `labels`.
        labels: of the rows.
        metadata: further strings and numbers, named after the architecture's prefix, with `_` for dots.

    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, architecture = model.config, {"mistral": "llama"}.get(model.config.model_type, model.config.model_type)
    writer = GGUFWriter(file, architecture)
    writer.add_name(model.config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(width)
    writer.add_value_length(width)
    if architecture == "llama":
        writer.add_rope_dimension_count(width)
    for name, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("__", "."), value)
    _add_tokenizer(writer, tokenizer)
    if labels:
        writer.add_classifier_output_labels(labels)
    names = get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if head is not None and name == "lm_head.weight":
            continue
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = _permuted(weight, len(weight) // width)
        _add_tensor(writer, names.get_name(name, try_suffixes=(".weight", ".bias")), weight, kind)
    if head is not None:
        _add_tensor(writer, "cls.output.weight", head, GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tensor(writer: GGUFWriter, name: str, weight: torch.Tensor, kind: GGMLQuantizationType) -> None:
    values = weight.detach().float().numpy()
    kind = kind if values.ndim == 2 else GGMLQuantizationType.F32
    writer.add_tensor(name, np.ascontiguousarray(quantize(values, kind)), raw_dtype=kind)


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the halves of each head, as llama.cpp's rotary embedding of Llama expects."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = {None: TokenType.NORMAL, True: TokenType.CONTROL, False: TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[added.get(number)] for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
