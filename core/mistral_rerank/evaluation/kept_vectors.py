"""Vectors kept on disk block by block, so that a stopped run does not encode a corpus again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.files import replacement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mistral_rerank.evaluation.encoders import Encoder, Kind, Vectors

BLOCK = 1024
"""Texts of a file."""


class KeepingEncoder:
    """An encoder whose vectors are kept in a folder, under a name made of the texts.

    Args:
        encoder: makes them.
        folder: holds files for this encoder alone; made when it is needed.

    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self._encoder, self._folder = encoder, folder

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        """See `Encoder.encode`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        made = [
            self._block(texts[start : start + BLOCK], kind, progress=progress)
            for start in range(0, len(texts), BLOCK)
        ]
        return np.concatenate(made)

    def _block(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        name = hashlib.sha256("\0".join([kind, *texts]).encode("utf-8", "surrogatepass")).hexdigest()
        file = self._folder / f"{name}.npy"
        if file.exists():
            vectors: Vectors = np.load(file, allow_pickle=False)
            progress(len(texts))
            return vectors
        vectors = self._encoder.encode(texts, kind, progress=progress)
        with replacement(file) as beside, beside.open("xb") as out:
            np.save(out, vectors, allow_pickle=False)
        return vectors
