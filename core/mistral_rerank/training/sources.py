"""Data sets of a training run: BEIR folders, or files of groups."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.datasets import load_beir, qrels_files
from mistral_rerank.training.groups import read_groups
from mistral_rerank.training.mining import mine

if TYPE_CHECKING:
    from pathlib import Path

    from mistral_rerank.evaluation.datasets import BeirDataset
    from mistral_rerank.training.groups import Group


def load_split(folder: Path, *splits: str) -> BeirDataset:
    """Read a BEIR folder; if it has several judged splits, the first of `splits` that exists."""
    existing = qrels_files(folder)
    split = next((name for name in splits if name in existing), None) if len(existing) > 1 else None
    return load_beir(folder, split=split)


def load_groups(
    source: Path,
    *splits: str,
    questions: int,
    negatives: int,
    random_negatives: int,
    max_queries: int | None = None,
    seed: int,
) -> list[Group]:
    """Read a file of groups, or mine the groups of a BEIR folder.

    Args:
        source: a `.jsonl` of groups, or a folder.
        splits: as in `load_split`.
        questions: of a mined group, like the next two; see `mine`.
        negatives: see `mine`.
        random_negatives: see `mine`.
        max_queries: questions taken at most, drawn with the seed.
        seed: the same seed gives the same groups.

    Raises:
        InvalidInputError: the source cannot be read, or is too small.

    """
    if source.suffix == ".jsonl":
        return _sample(source, max_queries, seed)
    return mine(
        load_split(source, *splits),
        questions=questions,
        negatives=negatives,
        random_negatives=random_negatives,
        max_queries=max_queries,
        seed=seed,
    ).groups


def _sample(file: Path, max_queries: int | None, seed: int) -> list[Group]:
    groups = read_groups(file)
    if max_queries is None:
        return groups
    random.Random(f"{seed}/{file.name}").shuffle(groups)  # noqa: S311 - sampling, not security
    sample, count = [], 0
    for group in groups:
        count += len(group.queries)
        if count > max_queries:
            break
        sample.append(group)
    if not sample:
        raise InvalidInputError(f"each group of {file} has more than {max_queries} questions; raise max_queries")
    return sample
