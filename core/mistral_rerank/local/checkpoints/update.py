"""Update a checkpoint, or a copy of it, with a calibration or an early exit."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.data_files.atomic import atomic_write, replacement
from mistral_rerank.errors import CheckpointError, SettingsError
from mistral_rerank.local.checkpoints.config import RERANK_JSON, Calibration
from mistral_rerank.local.checkpoints.detection import read_config
from mistral_rerank.local.checkpoints.loading import MINI, find_checkpoint
from mistral_rerank.local.checkpoints.trust import check_files
from mistral_rerank.local.model.early_exit import write_early_exit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mistral_rerank.local.checkpoints.config import CheckpointConfig
    from mistral_rerank.local.model.early_exit import EarlyExit, EarlyExitConfig


def checkpoint_to_update(model: str, out: Path | None) -> Path:
    """Return the folder of a checkpoint that may be updated.

    Raises:
        SettingsError: `model` is "mini" or a hub id and `out` is None, or `out` exists.
        CheckpointError: there is no such checkpoint.

    """
    if out is not None and out.exists():
        raise SettingsError(f"{out} exists; give another --out, or remove it")
    folder = find_checkpoint(model)
    if out is None and (model == MINI or not Path(model).expanduser().is_dir()):
        raise SettingsError(f"{model!r} is no folder of yours; give --out, and a changed copy is written there")
    return folder


def store_calibration(calibration: Calibration, folder: Path, out: Path | None) -> Path:
    """Write a calibration into `rerank.json` of the checkpoint or of a copy, atomically.

    Args:
        calibration: to store.
        folder: the checkpoint.
        out: the folder of the copy; None to update the checkpoint.

    Returns:
        The updated folder.

    Raises:
        CheckpointError: the folder cannot be written.

    """
    config = read_config(folder)
    with _updated(folder, out) as target:
        _write_config(config.model_copy(update={"calibration": calibration}), target)
    return out or folder


def store_early_exit(early_exit: EarlyExit, config: EarlyExitConfig, folder: Path, out: Path | None) -> Path:
    """Write an early exit into its files in the checkpoint or in a copy, like `store_calibration`."""
    with _updated(folder, out) as target:
        write_early_exit(early_exit, config, target)
    return out or folder


@contextmanager
def _updated(folder: Path, out: Path | None) -> Iterator[Path]:
    """Yield the folder to update: the checkpoint, or a copy that is renamed to `out` at the end."""
    try:
        if out is None:
            yield folder
            return
        check_files(folder)
        with replacement(out) as target:
            shutil.copytree(folder, target)
            yield target
    except OSError as error:
        raise CheckpointError(f"{out or folder} cannot be written: {error.strerror}") from error


def _write_config(config: CheckpointConfig, folder: Path) -> None:
    with atomic_write(folder / RERANK_JSON) as file:
        file.write(config.model_dump_json(indent=2) + "\n")
