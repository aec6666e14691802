"""Tensors in safetensors files, which are read one by one, so that a model never takes its memory twice.

Each tensor has a memory mapping of its own. When a cast, a merge or quantization replaces it, its pages are freed. One
mapping of a whole file would keep all its pages until the last tensor is replaced.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.local.checkpoints.trust import is_used, tensor_shapes, weight_files

if TYPE_CHECKING:
    from types import EllipsisType

    import torch

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


class StoredTensor:
    """A tensor in a file; `tensor[...]` reads it, as with the slices of safetensors."""

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._file, "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(self._name)
        return tensor[index] if _maps_often() else tensor[index].clone()


def stored_tensors(folder: Path, layers: int) -> dict[str, StoredTensor]:
    """Return the tensors of the first layers of a model; other shards are not opened.

    Raises:
        CheckpointError: as `weight_files` and `tensor_shapes`.

    """
    files = ((file, name) for file in weight_files(folder, layers) for name in tensor_shapes(file))
    return {name: StoredTensor(file, name) for file, name in files if is_used(name, layers)}


@functools.cache
def _maps_often() -> bool:
    """Tell whether a file can be mapped once for each tensor: Windows and strict overcommit reserve memory for it."""
    try:
        return sys.platform != "win32" and OVERCOMMIT.read_text("utf-8").strip() != "2"
    except OSError:  # no Linux
        return True
