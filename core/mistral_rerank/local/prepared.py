"""Prepared passages: the entries of a passage cache in a folder, computed once and mapped into memory.

    prepared.json                   what they were computed with, and the size of every shard; written last
    passages-00000.safetensors      ids, keys and values of each passage

Keys and values are of use to the same weights only, in the same dtype, so a folder for others is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mistral_rerank.data_files.atomic import replacement, write_json
from mistral_rerank.errors import CheckpointError, SettingsError
from mistral_rerank.local.model.cached_prefixes import CachedPrefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from mistral_rerank.local.engine.prefix_cache import Key

MANIFEST = "prepared.json"
SHARD_BYTES = 512 * 1024**2
AGAIN = "run `mistral-rerank prepare` again"


class Shard(BaseModel):
    """A file of passages."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(pattern=r"^passages-\d+\.safetensors$")
    bytes: int
    passages: int


class Manifest(BaseModel):
    """What passages were prepared with, and their shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    weights: str
    dtype: str
    quantization: str | None
    shards: tuple[Shard, ...] = ()


def manifest(weights: str, dtype: torch.dtype, quantization: str | None) -> Manifest:
    """Describe what passages are prepared with; `weights` is the checksum of a checkpoint."""
    return Manifest(weights=weights, dtype=str(dtype).removeprefix("torch."), quantization=quantization)


def write_prepared(folder: Path, prefixes: Iterable[Mapping[Key, CachedPrefix]], used: Manifest) -> None:
    """Write prepared passages into a folder that does not exist, atomically.

    Args:
        folder: to write.
        prefixes: of the model itself by their keys in the prefix cache, in parts; equal keys are written once.
        used: what they are computed with, without shards.

    Raises:
        SettingsError: the folder exists.

    """
    if folder.exists():
        raise SettingsError(f"{folder} exists; give another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    tensors: dict[str, torch.Tensor] = {}
    written: set[Key] = set()
    with replacement(folder) as temporary:
        temporary.mkdir()

        def write_shard() -> None:
            file = temporary / f"passages-{len(shards):05}.safetensors"
            save_file(tensors, file)
            shards.append(Shard(file=file.name, bytes=file.stat().st_size, passages=len(tensors) // 3))
            tensors.clear()

        for part in prefixes:
            for key in [key for key in part if key[0] is None and key not in written]:
                written.add(key)
                ids = torch.frombuffer(bytearray(key[1]), dtype=torch.int32)
                values = ids, part[key].keys, part[key].values
                tensors |= dict(zip(_names(len(tensors) // 3), values, strict=True))
            if sum(tensor.nbytes for tensor in tensors.values()) >= SHARD_BYTES:
                write_shard()
        if tensors:
            write_shard()
        write_json(temporary / MANIFEST, used.model_copy(update={"shards": tuple(shards)}).model_dump())


def read_prepared(folder: Path, expected: Manifest) -> dict[Key, CachedPrefix]:
    """Map prepared passages into memory, by their keys in the prefix cache.

    Args:
        folder: as `write_prepared` writes it.
        expected: what they must have been prepared with; its shards do not count.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or was prepared with something else.

    """
    try:
        stored = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(
            f"{folder} has no usable {MANIFEST}; give a folder of prepared passages, or {AGAIN}"
        ) from error
    if stored.weights != expected.weights:
        raise CheckpointError(f"{folder} was prepared with other weights or another tokenizer; {AGAIN} with this model")
    if (stored.dtype, stored.quantization) != (expected.dtype, expected.quantization):
        formats = [" and ".join(filter(None, (each.quantization, each.dtype))) for each in (stored, expected)]
        raise CheckpointError(f"{folder} was prepared in {formats[0]}, and the model runs in {formats[1]}; {AGAIN}")
    prefixes: dict[Key, CachedPrefix] = {}
    for shard in stored.shards:
        file = folder / shard.file
        try:
            if file.stat().st_size != shard.bytes:
                raise CheckpointError(f"{file} is truncated: {file.stat().st_size} of {shard.bytes} bytes; {AGAIN}")
            with safe_open(file, "pt") as tensors:
                for number in range(shard.passages):
                    ids, keys, values = map(tensors.get_tensor, _names(number))
                    prefixes[None, ids.numpy().tobytes()] = CachedPrefix(keys, values)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is missing or damaged ({error}); {AGAIN}") from error
    return prefixes


def _names(number: int) -> list[str]:
    """Name the tensors of a passage in its shard."""
    return [f"{number}.{name}" for name in ("ids", "keys", "values")]
