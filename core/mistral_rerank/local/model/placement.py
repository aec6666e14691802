"""Placement: a decoder's layers on several devices, in as many runs of layers of about the same number.

A forward goes through the devices one after another. The first also holds the embeddings, the final norm and the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def layer_devices(layers: int, devices: Sequence[torch.device]) -> list[torch.device]:
    """Return the device of each layer."""
    return [devices[layer * len(devices) // layers] for layer in range(layers)]


def place(backbone: Any, devices: Sequence[torch.device]) -> None:
    """Place a model of transformers. With several devices the inputs of each layer are moved to its device.

    Raises:
        CheckpointError: there are several devices, and the model is no decoder with `layers` and a final `norm`.

    """
    if len(devices) == 1:
        backbone.to(devices[0])
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    if not hasattr(backbone, "layers") or not hasattr(backbone, "norm"):
        raise CheckpointError(
            "the layers of a decoder can be on several devices; this is another model: give one device"
        )
    placed = zip(backbone.layers, layer_devices(len(backbone.layers), devices), strict=True)
    for name, module in backbone.named_children():
        if name != "layers":
            module.to(devices[0])
    for module, device in [*placed, (backbone.norm, devices[0])]:
        add_hook_to_module(module, AlignDevicesHook(device, place_submodules=True))
