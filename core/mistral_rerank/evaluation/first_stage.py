"""First-stage retrieval: what a reranker is given to reorder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_rerank.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Ranking = list[tuple[str, float]]
"""Passage ids with their scores, best first."""


class BM25:
    """BM25 by `bm25s`: English stop words and stemming, k1 0.9, b 0.4 (Anserini's defaults for BEIR).

    Args:
        corpus: passage id -> text.

    """

    def __init__(self, corpus: Mapping[str, str], *, k1: float = 0.9, b: float = 0.4) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise MissingDependencyError.of("eval", error) from error
        self._bm25s = bm25s
        self._stemmer = Stemmer.Stemmer("english")
        self._ids = list(corpus)
        self._index = bm25s.BM25(k1=k1, b=b)
        self._index.index(self._tokenize(list(corpus.values())), show_progress=False)

    def search(self, queries: Sequence[str], *, k: int) -> list[Ranking]:
        """Give the best `k` passages of every query, those without a common word left out."""
        depth = min(k, len(self._ids))
        found, scores = self._index.retrieve(self._tokenize(list(queries)), k=depth, show_progress=False)
        return [
            [(self._ids[i], float(s)) for i, s in zip(row, row_scores, strict=True) if s > 0]
            for row, row_scores in zip(found, scores, strict=True)
        ]

    def _tokenize(self, texts: list[str]) -> object:
        return self._bm25s.tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)
