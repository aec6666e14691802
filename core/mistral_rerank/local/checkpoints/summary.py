"""The summary of a checkpoint: how it is read and why, and how it runs on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ByteSize

from mistral_rerank.errors import MissingDependencyError
from mistral_rerank.local.checkpoints.loading import length_limit, open_checkpoint
from mistral_rerank.local.checkpoints.model_config import read_lora_config, read_model_config
from mistral_rerank.local.checkpoints.quiet import quiet

try:
    from mistral_rerank.local.device import pick_devices, pick_dtype
    from mistral_rerank.local.model.early_exit import read_early_exit_config
    from mistral_rerank.local.model.quantization import check_quantization
    from mistral_rerank.local.model.rotary import depends_on_length
    from mistral_rerank.local.model.transformer import KNOWN_LAYERS, key_value_bytes
except ImportError as error:
    raise MissingDependencyError.of("local", error) from error

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mistral_rerank.local.checkpoints.config import CheckpointConfig
    from mistral_rerank.reranker import Quantization


def summary(
    model: str,
    *,
    device: str,
    dtype: str,
    quantization: Quantization | None = None,
    base: str | None = None,
    rerank_config: str | None = None,
    passage_cache: int = 0,
) -> dict[str, str]:
    """Describe a checkpoint, how it is read and why, and how it runs on this machine, for display."""
    checkpoint = open_checkpoint(model, base=base, rerank_config=rerank_config)
    config, (torch_device, *further_devices) = checkpoint.config, pick_devices(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    check_quantization(quantization, torch_device, torch_dtype)
    folder = checkpoint.base or checkpoint.folder
    with quiet():
        model_config = read_model_config(folder, layers=checkpoint.layers)
    if checkpoint.base is not None:
        read_lora_config(checkpoint.folder)
    number_formats = filter(None, (quantization, str(torch_dtype).removeprefix("torch.")))
    is_packed = model_config.model_type in KNOWN_LAYERS and not config.head
    return {
        "model": f"{model} ({checkpoint.folder})",
        "base": "none, a whole model" if checkpoint.base is None else str(checkpoint.base),
        "architecture": f"{model_config.model_type}, {model_config.num_hidden_layers} layers of width "
        f"{model_config.hidden_size}",
        "read as": checkpoint.source,
        "template": _described_template(config),
        "instruction": config.instruction or ("none" if config.prompt.takes_instruction else "no place for one"),
        "head": _described_head(config),
        "pooling": f"{'mean of every' if config.pooling == 'mean' else config.pooling} token, "
        f"{config.attention} attention"
        if config.template is not None
        else f"{config.pooling} token of an encoder"
        if config.head
        else "that of the architecture",
        "longest input": f"{length_limit(checkpoint, model_config)} tokens",
        "calibration": str(config.calibration),
        "threshold": config.calibration.described_threshold,
        "early exit": str(read_early_exit_config(checkpoint.folder) or "none"),
        "batches": "packed rows, shared prefixes, int8, nf4" if is_packed else _why_padded(model_config),
        "passage cache": _described_cache(
            passage_cache,
            key_value_bytes(model_config, torch_dtype.itemsize)
            if is_packed
            and torch_device.type == "cpu"
            and config.pooling_config.shares
            and not depends_on_length(model_config)
            else 0,
            passage_first=config.template is not None and config.prompt.passage_first,
        ),
        "memory": f"{checkpoint.weight_bytes(torch_dtype.itemsize, quantization) / 1e9:.2f} GB of weights",
        "runs on": f"{', '.join(map(str, [torch_device, *further_devices]))} in {' and '.join(number_formats)}",
    }


def _why_padded(config: PreTrainedConfig) -> str:
    rows = "padded rows of transformers; no quantization, no cascade"
    capped = getattr(config, "attn_logit_softcapping", None)
    return f"{rows}; no fused attention on packed rows caps scores" if capped else rows


def _described_template(config: CheckpointConfig) -> str:
    if config.template is None:
        return "the tokenizer's format of a pair"
    text = config.template if isinstance(config.template, str) else "|".join(config.template)
    return text + ("<end token>" if config.append_eos else "")


def _described_cache(limit: int, token_bytes: int, *, passage_first: bool) -> str:
    if not token_bytes:
        return "not with this model on this device"
    cached = "passages" if passage_first else "the instruction; the passage comes after the question"
    size = f"{limit // token_bytes} tokens in {ByteSize(limit).human_readable()}" if limit else "off"
    return f"{size}, {token_bytes} bytes a token: {cached}"


def _described_head(config: CheckpointConfig) -> str:
    if config.head:
        return f"the modules {', '.join(config.head)}"
    if config.true_token is None:
        return "trained, one label"
    minus = "" if config.false_token is None else f" minus that of {config.false_token!r}"
    return f"the logit of the token {config.true_token!r}{minus}"
