"""Where a calibration is kept: `rerank.json` of a checkpoint; and the page that shows what it does."""

from __future__ import annotations

import os
import shutil
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_rerank.errors import CheckpointError, SettingsError
from mistral_rerank.evaluation.pages import page, reliability_section, section
from mistral_rerank.files import replacing
from mistral_rerank.local.bases import independent
from mistral_rerank.local.checkpoint import RERANK_JSON, Calibration, find_checkpoint, read_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mistral_rerank.training.calibration import Outcome


def stored(folder: Path) -> Calibration:
    """Give the calibration that a checkpoint has now."""
    return read_config(folder).calibration


def checkpoint_to_calibrate(model: str, out: Path | None) -> Path:
    """Give the folder of the checkpoint, refusing those that are not the user's to write.

    Raises:
        SettingsError: it is "mini" or a hub id and there is no `out`, or `out` exists.
        CheckpointError: there is no such checkpoint.

    """
    if out is not None and out.exists():
        raise SettingsError(f"{out} exists; give another --out, or remove it")
    folder = find_checkpoint(model)
    if out is None and not Path(model).expanduser().is_dir():
        raise SettingsError(f"{model!r} is no folder of yours; give --out, and a calibrated copy is written there")
    return folder


def store(calibration: Calibration, folder: Path, out: Path | None) -> Path:
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
    config = read_config(folder).model_copy(update={"calibration": calibration})
    target = folder if out is None else out.with_name(f"{out.name}.{os.getpid()}")
    try:
        if out is not None:
            shutil.copytree(folder, target)
            if config.base is not None:
                config = config.model_copy(update={"base": independent(config.base, relative_to=folder)})
        with replacing(target / RERANK_JSON) as file:
            file.write(config.model_dump_json(indent=2) + "\n")
        if out is not None:
            target.replace(out)
    except OSError as error:
        raise CheckpointError(f"the calibration cannot be written to {out or folder}: {error.strerror}") from error
    finally:
        if out is not None:
            shutil.rmtree(target, ignore_errors=True)
    return out or folder


def write_report(found: Sequence[Outcome], calibration: Calibration, file: Path) -> None:
    """Write an HTML page of the reliability before and after."""
    lead = f'<p class="lead">probability = {escape(str(calibration))}; threshold: '
    lead += f"{escape(calibration.described_threshold)}</p>"
    parts = [
        section(
            of.name,
            f"<p>{escape(of.at_threshold)}</p>" + reliability_section({"before": of.before, "after": of.after}),
        )
        for of in found
    ]
    with replacing(file) as out:
        out.write(page("Calibration", lead + "".join(parts)))
