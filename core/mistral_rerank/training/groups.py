"""Training examples: a question with one passage that answers it and some that do not."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.first_stage import BM25

if TYPE_CHECKING:
    from mistral_rerank.evaluation.beir import BeirDataset


@dataclass(frozen=True, slots=True)
class Group:
    """A question and its passages; the first answers it, the others do not."""

    query: str
    passages: tuple[str, ...]


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
