"""Conversion of weights in PyTorch's `.bin` format, a pickle, to safetensors: for published adapters such as RankLLaMA.

A pickle is read in a process of its own, with torch's unpickler for weights, which builds tensors and nothing else.
"""

from __future__ import annotations

import json
import shutil
from multiprocessing import get_context
from pathlib import Path

from mistral_rerank.data_files.atomic import replacement
from mistral_rerank.errors import CheckpointError, SettingsError
from mistral_rerank.local.checkpoints.bases import pretrained_folder
from mistral_rerank.local.checkpoints.trust import check_files, read_json

WEIGHTS = {"pytorch_model": "model", "adapter_model": "adapter_model"}
"""Names of weight files, without their suffixes: in PyTorch's format and in safetensors."""
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*")


def convert(model: str, out: Path) -> None:
    """Write a copy of a folder whose weights are safetensors; `out` is written atomically.

    Args:
        model: a folder with `.bin` files.
        out: the folder to write; it must not exist.

    Raises:
        SettingsError: `out` exists.
        CheckpointError: the folder has no such weights, or they are not usable.

    """
    if out.exists():
        raise SettingsError(f"{out} exists; give another folder, or remove it")
    folder = pretrained_folder(model)
    check_files(folder)
    files = sorted(file for file in folder.glob("*.bin") if _stem(file) is not None)
    if not files:
        raise CheckpointError(
            f"{folder} has no pytorch_model.bin and no adapter_model.bin; there is nothing to convert"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacement(out) as target:
        target.mkdir()
        for file in files:
            _convert_apart(file, target / f"{_stem(file)}.safetensors")
        for file in (file for pattern in COPIED for file in folder.glob(pattern)):
            if not file.name.endswith(".bin.index.json"):
                shutil.copyfile(file, target / file.name)
        for index in folder.glob("*.bin.index.json"):
            content = read_json(index)
            names = content.get("weight_map")
            if not isinstance(names, dict) or not all(_stem(Path(str(name))) for name in names.values()):
                raise CheckpointError(f"{index}: weight_map names other files than those of the weights")
            content["weight_map"] = {tensor: f"{_stem(Path(name))}.safetensors" for tensor, name in names.items()}
            (target / "model.safetensors.index.json").write_text(json.dumps(content), "utf-8")


def _stem(file: Path) -> str | None:
    """Return the name in safetensors, without suffix, of a file such as pytorch_model-00001-of-00002.bin."""
    prefix, dash, number = file.name.removesuffix(".bin").partition("-")
    return None if prefix not in WEIGHTS else f"{WEIGHTS[prefix]}{dash}{number}"


def _convert_apart(source: Path, target: Path) -> None:
    process = get_context("spawn").Process(target=_convert_file, args=(str(source), str(target)))
    process.start()
    process.join()
    if process.exitcode or not target.is_file():
        raise CheckpointError(f"{source} is not usable: it is damaged, or holds other objects than tensors")


def _convert_file(source: str, target: str) -> None:
    """Convert one file; in a process of its own."""
    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
        tensors = {str(name): tensor.clone().contiguous() for name, tensor in content.items()}  # none share memory
        save_file(tensors, target, metadata={"format": "pt"})
    except Exception as error:
        raise SystemExit(f"{source}: {type(error).__name__}") from None
