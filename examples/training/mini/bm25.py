"""BM25 for hard negatives, on one thread."""

import os

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s starts jax where it is installed; on a GPU it takes the memory
import bm25s


def index_of(texts: list[str]) -> bm25s.BM25:
    """Index texts."""
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    return index


def best_rows(index: bm25s.BM25, questions: list[str], k: int) -> NDArray[np.int64]:
    """Return the rows of the best texts of each question: (questions, k)."""
    tokens = bm25s.tokenize(questions, stopwords="en", show_progress=False)
    rows: NDArray[np.int64] = index.retrieve(
        tokens, k=k, show_progress=False, n_threads=1, backend_selection="numpy"
    ).documents
    return rows
