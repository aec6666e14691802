"""First-stage retrieval: BM25, embedding models, both fused, or TREC run files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mistral_rerank.errors import InvalidInputError, MissingDependencyError, SettingsError
from mistral_rerank.evaluation.embedding_models import open_encoder
from mistral_rerank.evaluation.encoders import CachedEncoder
from mistral_rerank.evaluation.run_files import Ranking, read_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from mistral_rerank.evaluation.datasets import BeirDataset
    from mistral_rerank.evaluation.encoders import Encoder

    Progress = Callable[[int, int], None]

FUSED_DEPTH = 100
"""Minimum depth of the rankings that a hybrid fuses."""


class FirstStage(Protocol):
    """Finds candidates for the questions of a data set."""

    def search(self, dataset: BeirDataset, queries: Sequence[str], *, k: int, progress: Progress) -> list[Ranking]:
        """Give at most `k` passages of each query id; `progress` receives the numbers of texts done and in all."""


class BM25:
    """BM25 by `bm25s`: English stop words and stemming, k1 0.9, b 0.4 (Anserini's defaults for BEIR)."""

    def __init__(self, corpus: Mapping[str, str]) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise MissingDependencyError.of("eval", error) from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
        self._bm25s = bm25s
        self._stemmer = Stemmer.Stemmer("english")
        self._ids = list(corpus)
        self._index = bm25s.BM25(k1=0.9, b=0.4)
        self._index.index(self._tokenize(list(corpus.values())), show_progress=False)

    def search(self, queries: Sequence[str], *, k: int) -> list[Ranking]:
        """Give the best `k` passages of every query, without those that share no word with it."""
        depth = min(k, len(self._ids))
        indices, scores = self._index.retrieve(
            self._tokenize(list(queries)), k=depth, show_progress=False, backend_selection="numpy"
        )  # "auto" would run jax where it is installed, on a GPU too
        return [
            [(self._ids[i], float(s)) for i, s in zip(row, row_scores, strict=True) if s > 0]
            for row, row_scores in zip(indices, scores, strict=True)
        ]

    def shares(self, query: str) -> NDArray[np.float32]:
        """Give every passage's score divided by the best one's: (passages,), from 0 to 1, in corpus order."""
        words = self._tokenize([query], return_ids=False)[0]
        if not words:
            return np.zeros(len(self._ids), np.float32)
        scores: NDArray[np.float32] = self._index.get_scores(words)
        return scores / (scores.max() or 1.0)

    def _tokenize(self, texts: list[str], *, return_ids: bool = True) -> Any:
        options = {"stopwords": "en", "stemmer": self._stemmer, "show_progress": False}
        return self._bm25s.tokenize(texts, return_ids=return_ids, **options)


class BM25Stage:
    """BM25 over the corpus of each data set."""

    def search(self, dataset: BeirDataset, queries: Sequence[str], *, k: int, progress: Progress) -> list[Ranking]:
        """See `FirstStage.search`."""
        rankings = BM25(dataset.corpus).search([dataset.queries[query] for query in queries], k=k)
        progress(len(dataset.corpus), len(dataset.corpus))
        return rankings


class DenseStage:
    """Exact search by the dot products of embeddings."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def search(self, dataset: BeirDataset, queries: Sequence[str], *, k: int, progress: Progress) -> list[Ranking]:
        """See `FirstStage.search`."""
        ids, done, total = list(dataset.corpus), 0, len(dataset.corpus) + len(queries)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        questions = self._encoder.encode([dataset.queries[query] for query in queries], "query", progress=advance)
        passages = self._encoder.encode(list(dataset.corpus.values()), "passage", progress=advance)
        rankings = []
        for vector in questions:
            scores = passages @ vector
            best = np.argsort(-scores, kind="stable")[:k]
            rankings.append([(ids[i], float(scores[i])) for i in best])
        return rankings


class HybridStage:
    """Several first stages, fused by reciprocal rank."""

    def __init__(self, stages: Sequence[FirstStage]) -> None:
        self._stages = stages

    def search(self, dataset: BeirDataset, queries: Sequence[str], *, k: int, progress: Progress) -> list[Ranking]:
        """See `FirstStage.search`."""
        depth = max(k, FUSED_DEPTH)
        of_stages = [stage.search(dataset, queries, k=depth, progress=progress) for stage in self._stages]
        return [
            fuse([[passage for passage, _ in ranking] for ranking in rankings])[:k]
            for rankings in zip(*of_stages, strict=True)
        ]


class RunStage:
    """Rankings from a TREC run file, or from a folder with `<data set>.trec` for each set."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def search(self, dataset: BeirDataset, queries: Sequence[str], *, k: int, progress: Progress) -> list[Ranking]:
        """See `FirstStage.search`; a query that the file lacks has no candidates."""
        file = self._path / f"{dataset.name}.trec" if self._path.is_dir() else self._path
        if not file.is_file():
            raise InvalidInputError(f"there is no run file {file}; name a file, or a folder with {dataset.name}.trec")
        run = read_run(file)
        if not any(query in run for query in queries):
            raise InvalidInputError(f"{file} holds none of the queries of {dataset.name}; it is another set's run")
        rankings = [run.get(query, [])[:k] for query in queries]
        check_passages(rankings, dataset, file)
        progress(len(queries), len(queries))
        return rankings


def fuse(rankings: Sequence[Sequence[str]]) -> Ranking:
    """Fuse rankings of passage ids: each adds 1 / (60 + rank) to its passages; ranks start at 1.

    Equal sums are ordered by the best rank, then by the first ranking that holds the passage.

    Source: reciprocal rank fusion, Cormack, Clarke and Buettcher, SIGIR 2009.
    """
    sums: dict[str, float] = {}
    best: dict[str, tuple[int, int]] = {}
    for stage, ranking in enumerate(rankings):
        for rank, passage in enumerate(ranking, start=1):
            sums[passage] = sums.get(passage, 0.0) + 1.0 / (60 + rank)
            best[passage] = min(best.get(passage, (rank, stage)), (rank, stage))
    return sorted(sums.items(), key=lambda item: (-item[1], best[item[0]]))


def check_passages(rankings: Iterable[Ranking], dataset: BeirDataset, file: Path) -> None:
    """Raise `InvalidInputError` if a ranked passage is not in the corpus."""
    for passage in (passage for ranking in rankings for passage, _ in ranking):
        if passage not in dataset.corpus:
            raise InvalidInputError(f"{file} ranks passage {passage!r}, which the corpus of {dataset.name} lacks")


def open_first_stage(
    name: str,
    *,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
    device: str | None = None,
    vectors: Path | None = None,
) -> FirstStage:
    """Open the first stage of that name.

    Args:
        name: `bm25`; `dense:MODEL`; `hybrid:MODEL`, which is BM25 and that model; or the path of a run file or of a
            folder of them. MODEL is a name for `open_encoder`.
        query_prefix: of `open_encoder`, as the next two.
        passage_prefix: prepended to passages, instead of the preset's.
        device: of a model on this machine; None for the best available.
        vectors: the folder of an embedding cache, for a run that may be stopped; None for no cache.

    Raises:
        SettingsError: it is none of these.

    """
    kind, _, model = name.partition(":")
    if name == "bm25":
        return BM25Stage()
    if kind in ("dense", "hybrid") and model:
        encoder = open_encoder(model, query_prefix=query_prefix, passage_prefix=passage_prefix, device=device)
        dense = DenseStage(encoder if vectors is None else CachedEncoder(encoder, vectors))
        return dense if kind == "dense" else HybridStage([BM25Stage(), dense])
    if Path(name).expanduser().exists():
        return RunStage(Path(name).expanduser())
    raise SettingsError(
        f"the first stage {name!r} is not known; give bm25, dense:MODEL, hybrid:MODEL, or the path of a TREC run"
    )
