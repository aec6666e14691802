"""Add to a checkpoint what is fitted after its training: the checkpoint itself, or a copy of it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.errors import CheckpointError, SettingsError
from mistral_rerank.files import replacement, replacing
from mistral_rerank.local.checkpoint import RERANK_JSON, Calibration, find_checkpoint, read_config
from mistral_rerank.local.early_exit import write_early_exit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mistral_rerank.local.checkpoint import CheckpointConfig
    from mistral_rerank.local.early_exit import EarlyExit, EarlyExitConfig


def checkpoint_to_amend(model: str, out: Path | None) -> Path:
    """Give the folder of a checkpoint, refusing those that are not the user's to write.

    Raises:
        SettingsError: it is "mini" or a hub id and there is no `out`, or `out` exists.
        CheckpointError: there is no such checkpoint.

    """
    if out is not None and out.exists():
        raise SettingsError(f"{out} exists; give another --out, or remove it")
    folder = find_checkpoint(model)
    if out is None and not Path(model).expanduser().is_dir():
        raise SettingsError(f"{model!r} is no folder of yours; give --out, and a changed copy is written there")
    return folder


def store_calibration(calibration: Calibration, folder: Path, out: Path | None) -> Path:
    """Write a calibration into `rerank.json`, of the checkpoint itself or of a copy; whole or not at all.

    Args:
        calibration: what to store.
        folder: the checkpoint.
        out: the folder of the copy; None to change the checkpoint.

    Returns:
        The folder that holds it.

    Raises:
        CheckpointError: the folder cannot be written.

    """
    with _amended(folder, out) as target:
        _write_config(read_config(target).model_copy(update={"calibration": calibration}), target)
    return out or folder


def store_early_exit(early_exit: EarlyExit, config: EarlyExitConfig, folder: Path, out: Path | None) -> Path:
    """Write an early exit likewise, into its own file."""
    with _amended(folder, out) as target:
        write_early_exit(early_exit, config, target)
    return out or folder


@contextmanager
def _amended(folder: Path, out: Path | None) -> Iterator[Path]:
    """Give the folder to change: the checkpoint itself, or a copy that becomes `out` at the end."""
    try:
        if out is None:
            yield folder
            return
        read_config(folder)  # which sees that no link leads out of it
        with replacement(out) as target:
            shutil.copytree(folder, target)
            yield target
    except OSError as error:
        raise CheckpointError(f"{out or folder} cannot be written: {error.strerror}") from error


def _write_config(config: CheckpointConfig, folder: Path) -> None:
    with replacing(folder / RERANK_JSON) as file:
        file.write(config.model_dump_json(indent=2) + "\n")
