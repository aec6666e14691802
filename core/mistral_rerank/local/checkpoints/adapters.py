"""Several adapters on one base: which ones share it, and how they are loaded without a second copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.errors import CheckpointError
from mistral_rerank.local.checkpoints.config import PretrainedBase
from mistral_rerank.local.checkpoints.detection import read_config
from mistral_rerank.local.checkpoints.loading import (
    Checkpoint,
    cast_parameters,
    find_checkpoint,
    load_lora,
    load_unmerged,
    low_rank_of,
    open_checkpoint,
)
from mistral_rerank.local.checkpoints.model_config import read_lora_config, read_model_config
from mistral_rerank.local.model.lora import ActiveAdapter, AdaptedLinear, LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class SharedBase:
    """A loaded base with its adapters.

    Attributes:
        model: the base, whose linears apply the active adapter.
        heads: of each adapter; None names the model itself.
        active: selects the adapter.

    """

    model: PreTrainedModel
    heads: Mapping[str | None, nn.Module]
    active: ActiveAdapter


def open_adapters(
    checkpoint: Checkpoint, adapters: Mapping[str, str], *, base: str | None = None
) -> dict[str, Checkpoint]:
    """Find the checkpoints of adapters that share the base of a model.

    An adapter that was trained on a folder names no base; that of the model counts as its own.

    Args:
        checkpoint: the model, whole or an adapter.
        adapters: names, with folders or hub ids.
        base: as in `open_checkpoint`, of the model and of all adapters.

    Raises:
        CheckpointError: an adapter is a whole model, or its base or its number of layers is another one.

    """
    shared = checkpoint.base or checkpoint.folder
    opened = {}
    for name, model in adapters.items():
        folder = find_checkpoint(model)
        config = read_config(folder)
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"the adapter {name!r} ({model}) is a whole model; give a folder with a LoRA adapter")
        is_unnamed = isinstance(config.base, PretrainedBase) and config.base.name is None
        adapter = open_checkpoint(model, base=str(shared) if base is None and is_unnamed else base)
        if _base_and_layers(adapter) != _base_and_layers(checkpoint):
            raise CheckpointError(
                f"the adapter {name!r} ({model}) is for {_described(adapter)}, and the model is "
                f"{_described(checkpoint)}; adapters of a model share its base and its layers. Open it alone; or, if "
                "the two folders hold the same base, give one of them as base"
            )
        opened[name] = adapter
    return opened


def _base_and_layers(checkpoint: Checkpoint) -> tuple[Path, int]:
    folder = (checkpoint.base or checkpoint.folder).resolve()
    return folder, checkpoint.layers or read_model_config(folder).num_hidden_layers


def _described(checkpoint: Checkpoint) -> str:
    folder, layers = _base_and_layers(checkpoint)
    return f"{layers} layers of {folder}"


def load_shared(checkpoint: Checkpoint, adapters: Mapping[str, Checkpoint], *, dtype: torch.dtype) -> SharedBase:
    """Load a model once, with adapters; each scores as `load_model` alone would make it score, to the last bit.

    Args:
        checkpoint: the model.
        adapters: by name, as `open_adapters` gives them.
        dtype: of inference, as in `load_model`.

    Raises:
        CheckpointError: as `load_model`, or an adapter changes more than linears and the head.

    """
    model = load_unmerged(checkpoint)
    if not hasattr(model, "score") or checkpoint.config.head:
        raise CheckpointError(f"{checkpoint.folder}: adapters need a decoder with a score head; this is another model")
    heads: dict[str | None, nn.Module] = {None: model.score}
    low_ranks: dict[str, dict[str | None, LowRank]] = {}
    own: dict[str | None, Checkpoint] = {} if checkpoint.base is None else {None: checkpoint}
    for name, adapter in (own | dict(adapters)).items():
        adapted = load_lora(model, adapter)
        for path, low_rank in _low_ranks(adapted.get_base_model(), adapter).items():
            low_ranks.setdefault(path, {})[name] = low_rank
        model = adapted.unload()
        heads[name] = model.score
    active = ActiveAdapter()
    for path, by_adapter in low_ranks.items():
        parent, _, child = path.rpartition(".")
        linear = AdaptedLinear(model.get_submodule(path), dtype, by_adapter, active)
        setattr(model.get_submodule(parent), child, linear)
    cast_parameters(model.base_model, dtype)
    return SharedBase(model, heads, active)


def _low_ranks(model: nn.Module, adapter: Checkpoint) -> dict[str, LowRank]:
    """Return what an adapter adds to each linear, by the linear's path."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    low_ranks: dict[str, LowRank] = {}
    others = [] if read_lora_config(adapter.folder).bias == "none" else ["biases"]
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            others += [path] * (path != "score")
        elif isinstance(module, BaseTunerLayer):
            low_rank = low_rank_of(module)
            if low_rank is None:
                others.append(path)
            else:
                low_ranks[path] = low_rank
    if others:
        raise CheckpointError(
            f"{adapter.folder} changes {', '.join(others[:3])}; adapters that share a base change linears by plain "
            "LoRA, and the score head. Open it alone, as model"
        )
    return low_ranks
