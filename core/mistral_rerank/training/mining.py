"""Hard negatives that a teacher has checked, and the teacher's own scores to learn from.

Candidates come from BM25. A bi-encoder compares each with the question; those that it finds nearly as close as the
passage known to answer are left out, because many of them answer too and nobody judged them (positive-aware
mining, arXiv 2407.15831). What is left becomes a group, with the teacher's similarities as scores to distil.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mistral_rerank.errors import InvalidInputError, MissingDependencyError, SettingsError
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.training.groups import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from mistral_rerank.evaluation.beir import BeirDataset

SHARE_OF_POSITIVE = 0.95
"""A candidate at or over this share of the positive's similarity may answer too."""
TEACHER_SCALE = 15.0
"""Similarities times this are the teacher's logits: a softmax over raw cosines would be flat."""


class Teacher(Protocol):
    """A bi-encoder: unit vectors of texts, so that their products are similarities."""

    def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """Give one vector a text."""


class BiEncoder:
    """A sentence-transformers model.

    Args:
        model: a folder or a hub id.

    Raises:
        MissingDependencyError: the extra `dense` is not installed.

    """

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingDependencyError.of("dense", error) from error
        self._model = SentenceTransformer(model, trust_remote_code=False)

    def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """Give unit vectors (texts, width)."""
        vectors: Sequence[Sequence[float]] = self._model.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False
        ).tolist()
        return vectors


@dataclass(frozen=True, slots=True)
class Mined:
    """The groups of one data set.

    Attributes:
        groups: one a question; the teacher's logits stand in `teacher`.
        short: how many groups had to take a negative that the teacher finds close to the positive.

    """

    groups: list[Group]
    short: int


def mine(
    dataset: BeirDataset,
    teacher: Teacher,
    *,
    negatives: int,
    depth: int = 40,
    max_queries: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Mined:
    """Draw one group for every question of a data set.

    Args:
        dataset: judged questions and their corpus.
        teacher: compares questions and passages.
        negatives: passages of a group beside the positive; half as many more are tried.
        depth: how far down the BM25 ranking candidates may come from. Random ones fill up where it finds too few.
        max_queries: draw this many questions at most.
        seed: the same seed gives the same groups.
        progress: is told how many more questions are done.

    Raises:
        InvalidInputError: the corpus is too small for a group of this size.

    """
    chance = random.Random(f"{seed}/{dataset.name}")  # noqa: S311 - sampling, not security
    ids = [query for query in dataset.queries if dataset.positives(query)]
    chance.shuffle(ids)
    ids = ids[:max_queries]
    corpus, tried = list(dataset.corpus), negatives + negatives // 2
    rankings = BM25(dataset.corpus).search([dataset.queries[query] for query in ids], k=depth)
    groups, short = [], 0
    for query, ranking in zip(ids, rankings, strict=True):
        judged = set(dataset.positives(query))
        if len(corpus) < len(judged) + tried:
            raise InvalidInputError(f"{dataset.name} has {len(corpus)} passages, too few for {tried} negatives")
        hard = [passage for passage, _ in ranking if passage not in judged]
        candidates = chance.sample(hard, min(tried, len(hard)))
        while len(candidates) < tried:
            other = chance.choice(corpus)
            if other not in judged and other not in candidates:
                candidates.append(other)
        texts = [dataset.corpus[passage] for passage in [chance.choice(dataset.positives(query)), *candidates]]
        question, *vectors = teacher.embed([dataset.queries[query], *texts])
        near = [sum(a * b for a, b in zip(question, vector, strict=True)) for vector in vectors]
        limit = SHARE_OF_POSITIVE * near[0]
        order = sorted(range(1, len(texts)), key=lambda i: (near[i] >= limit, near[i] if near[i] >= limit else 0.0))
        chosen = [0, *order[:negatives]]
        short += any(near[i] >= limit for i in chosen[1:])
        groups.append(
            Group(
                dataset.queries[query],
                tuple(texts[i] for i in chosen),
                tuple(round(TEACHER_SCALE * near[i], 4) for i in chosen),
            )
        )
        progress(1)
    return Mined(groups, short)


def write_groups(groups: Iterable[Group], out: Path) -> None:
    """Write groups as JSON lines, whole or not at all.

    Raises:
        SettingsError: `out` exists.

    """
    if out.exists():
        raise SettingsError(f"{out} exists; give another file, or remove it")
    beside = out.with_name(f"{out.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as lines:
        for group in groups:
            record = {"query": group.query, "passages": group.passages, "teacher": group.teacher}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    beside.replace(out)
