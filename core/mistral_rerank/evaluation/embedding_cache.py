"""An embedding cache on disk, so that a stopped run does not encode a corpus again."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.data_files.atomic import replacement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mistral_rerank.evaluation.encoders import Encoder, Kind, Vectors

BLOCK = 1024
"""Texts per file."""


class CachedEncoder:
    """An encoder with an embedding cache. Files are named by the hash of their texts.

    Args:
        encoder: encodes what is not in the cache.
        folder: holds the cache of this encoder alone; created on first use.

    """

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self._encoder, self._folder = encoder, folder

    def encode(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
        """See `Encoder.encode`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
        return np.concatenate([self._encode_block(block, kind, progress=progress) for block in blocks])

    def _encode_block(self, texts: Sequence[str], kind: Kind, *, progress: Callable[[int], None]) -> Vectors:
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
