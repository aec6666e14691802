"""Training examples: a question with one passage that answers it and some that do not."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.first_stage import BM25

if TYPE_CHECKING:
    from pathlib import Path

    from mistral_rerank.evaluation.beir import BeirDataset


@dataclass(frozen=True, slots=True)
class Group:
    """A question and its passages; the first answers it, the others do not."""

    query: str
    passages: tuple[str, ...]
    teacher: tuple[float, ...] | None = None
    """What another model thinks of every passage: logits, whose softmax over the group is the target."""


_GROUP_LINE = TypeAdapter(Group)


def make_groups(
    dataset: BeirDataset,
    *,
    negatives: int,
    random_negatives: int,
    depth: int = 30,
    max_queries: int | None = None,
    seed: int = 0,
) -> list[Group]:
    """Draw one group for every question of a data set.

    Args:
        dataset: judged questions and their corpus.
        negatives: passages drawn from the BM25 top `depth` that are not judged relevant.
        random_negatives: passages drawn from the whole corpus. They also fill up where BM25 finds too few.
        depth: how far down the BM25 ranking negatives may come from.
        max_queries: draw this many questions at most.
        seed: the same seed gives the same groups.

    Raises:
        InvalidInputError: the corpus is too small for a group of this size.

    """
    chance = random.Random(f"{seed}/{dataset.name}")  # noqa: S311 - sampling, not security
    ids = [query for query in dataset.queries if dataset.positives(query)]
    chance.shuffle(ids)
    ids = ids[:max_queries]
    corpus = list(dataset.corpus)
    rankings = BM25(dataset.corpus).search([dataset.queries[query] for query in ids], k=depth)
    groups = []
    for query, ranking in zip(ids, rankings, strict=True):
        judged = set(dataset.positives(query))
        if len(corpus) < len(judged) + negatives + random_negatives:
            raise InvalidInputError(
                f"{dataset.name} has {len(corpus)} passages, too few for {negatives + random_negatives} negatives"
            )
        hard = [passage for passage, _ in ranking if passage not in judged]
        chosen = chance.sample(hard, min(negatives, len(hard)))
        while len(chosen) < negatives + random_negatives:
            other = chance.choice(corpus)
            if other not in judged and other not in chosen:
                chosen.append(other)
        passages = [chance.choice(dataset.positives(query)), *chosen]
        groups.append(Group(dataset.queries[query], tuple(dataset.corpus[passage] for passage in passages)))
    return groups


def read_groups(file: Path) -> list[Group]:
    """Read groups from JSON lines: `query`, `passages` (the first answers it) and, if a teacher gave any, `teacher`.

    Raises:
        InvalidInputError: a line is not of that format; it names the file and line.

    """
    groups = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                groups.append(_GROUP_LINE.validate_json(line))
            except ValidationError as error:
                raise InvalidInputError(f"{file}, line {number}: {error.errors()[0]['msg']}") from error
            group = groups[-1]
            if len(group.passages) < 2 or (group.teacher and len(group.teacher) != len(group.passages)):
                raise InvalidInputError(
                    f"{file}, line {number}: a group needs two passages, and teacher scores for all of them or none"
                )
    return groups
