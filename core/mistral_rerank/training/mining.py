"""Groups to train on, from judged questions: hard negatives, checked by a teacher where there is one.

Questions whose passages a first stage finds together share a group, so that each one's answer is a hard negative of
the others; the rest of the group are passages that it ranks high, and random ones. A model that is to be trained
further may rank them first: what it puts on top is what it has to unlearn. A teacher then compares every question
with every passage: those that it scores nearly as high as the passage known to answer count as unknown, because many
of them answer too and nobody judged them (positive-aware mining, arXiv 2407.15831), and its scores are kept to be
distilled.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.first_stage import BM25Stage
from mistral_rerank.training.groups import Group
from mistral_rerank.training.teacher import teach

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from mistral_rerank.evaluation.beir import BeirDataset
    from mistral_rerank.evaluation.encoders import Encoder
    from mistral_rerank.evaluation.first_stage import FirstStage
    from mistral_rerank.reranker import Reranker
    from mistral_rerank.training.teacher import Drawn, Teaching

SHARE_OF_POSITIVE = 0.95
"""A passage at or over this share of the positive's score by the teacher may answer too."""
JUDGED_BELOW = 5.0
"""A passage judged not to answer lies at least so far below the best in the teacher's logits: under 1% of the best's
probability, whatever the teacher thinks of it."""


@dataclass(frozen=True, slots=True)
class Mined:
    """The groups of one data set.

    Attributes:
        groups: questions with passages; the teacher's logits stand in `teacher`.
        short: questions that are left with fewer known negatives than were asked for.
        teaching: how the teacher judged; None without one.

    """

    groups: list[Group]
    short: int
    teaching: Teaching | None = None


def mine(
    dataset: BeirDataset,
    teacher: Encoder | None = None,
    *,
    first_stage: FirstStage | None = None,
    reranker: Reranker | None = None,
    questions: int = 1,
    negatives: int,
    random_negatives: int = 0,
    depth: int = 30,
    max_queries: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Mined:
    """Draw the groups of a data set; every question is in one.

    Args:
        dataset: judged questions and their corpus.
        teacher: compares questions and passages, beside BM25; None for groups without a teacher's scores.
        first_stage: finds the negatives; None for BM25.
        reranker: reorders the `depth` passages that the first stage found, and negatives come from its upper half.
        questions: of a group. What is left over at the end, fewer than these, is left out.
        negatives: passages of a group, beside its questions' own, that are judged not to answer one of them, or else
            that the first stage finds for them. Where there are too few, and where two questions share a passage,
            random ones fill up.
        random_negatives: passages of a group drawn from the whole corpus.
        depth: how far down the ranking negatives may come from.
        max_queries: take this many questions at most.
        seed: the same seed gives the same groups.
        progress: is told how many more questions are done.

    Raises:
        InvalidInputError: the corpus is too small for a group of this size.

    """
    size = questions + negatives + random_negatives
    if size < 2:
        raise InvalidInputError("a group of one passage teaches nothing; ask for negatives, or for more questions")
    if size > len(dataset.corpus):
        raise InvalidInputError(
            f"{dataset.name} has {len(dataset.corpus)} passages, too few for groups of {size}; ask for smaller ones"
        )
    chance = random.Random(f"{seed}/{dataset.name}")  # noqa: S311 - sampling, not security
    answers = {query: [p for p in dataset.positives(query) if p in dataset.corpus] for query in dataset.queries}
    ids = [query for query in dataset.queries if answers[query]]
    chance.shuffle(ids)
    ids = ids[:max_queries]
    if len(ids) < questions:
        raise InvalidInputError(
            f"{dataset.name} has {len(ids)} questions with an answer in its corpus, too few for groups of {questions}"
        )
    rankings = (first_stage or BM25Stage()).search(dataset, ids, k=depth, progress=lambda *_: None)
    found = {query: [passage for passage, _ in ranking] for query, ranking in zip(ids, rankings, strict=True)}
    if reranker is not None:
        found = {query: _upper_half(dataset, query, passages, reranker) for query, passages in found.items()}
    corpus = list(dataset.corpus)
    drawn: list[Drawn] = [
        (cluster, _passages(dataset, {q: answers[q] for q in cluster}, found, corpus, negatives, size, chance))
        for cluster in _clusters(answers, ids, found, questions)
    ]
    if teacher is None:
        groups, teaching = [_group(dataset, *group, None) for group in drawn], None
        progress(len(drawn) * questions)
    else:
        teaching = teach(dataset, drawn, teacher, progress=progress)
        groups = [_group(dataset, *group, logits) for group, logits in zip(drawn, teaching.logits, strict=True)]
    known = max(1, negatives + random_negatives)
    short = sum(row.count(0.0) < known for group in groups for row in group.grades)
    return Mined(groups, short, teaching)


def _upper_half(dataset: BeirDataset, query: str, passages: Sequence[str], reranker: Reranker) -> list[str]:
    """Give the passages that a model ranks highest."""
    ranked = reranker.rank(dataset.queries[query], [dataset.corpus[passage] for passage in passages])
    return [passages[place.index] for place in ranked[: (len(passages) + 1) // 2]]


def _clusters(
    answers: dict[str, list[str]], ids: Sequence[str], found: dict[str, list[str]], size: int
) -> list[tuple[str, ...]]:
    """Put questions together whose answers BM25 finds for one another; every question is in at most one cluster.

    Two questions at most come from one passage, so that the others' passages stay negatives; a cluster that this
    leaves short is filled up with any others.
    """
    asked_of: dict[str, list[str]] = {}
    for query in ids:
        for passage in answers[query]:
            asked_of.setdefault(passage, []).append(query)
    free = dict.fromkeys(ids)
    clusters = []
    while len(free) >= size:
        cluster = [next(iter(free))]
        del free[cluster[0]]
        used = list(answers[cluster[0]])
        for member in cluster:  # grows as it is walked
            near = (other for passage in found[member] for other in asked_of.get(passage, ()))
            for other in near:
                if len(cluster) == size:
                    break
                own = answers[other]
                if other in free and all(used.count(passage) < 2 for passage in own):
                    del free[other]
                    cluster.append(other)
                    used += own
        while len(cluster) < size:
            other = next(reversed(free))
            del free[other]
            cluster.append(other)
        clusters.append(tuple(cluster))
    return clusters


def _passages(
    dataset: BeirDataset,
    answers: dict[str, list[str]],
    found: dict[str, list[str]],
    corpus: Sequence[str],
    negatives: int,
    size: int,
    chance: random.Random,
) -> list[str]:
    """Give the passage ids of a group: an answer of each question, then hard negatives, then random ones.

    Passages judged not to answer are the hard negatives to take first. What answers a question of the group, or reads
    the same, is no negative.
    """
    chosen: list[str] = []
    for own in answers.values():
        if not any(passage in chosen for passage in own):
            chosen.append(chance.choice(own))
    most = len(chosen) + negatives
    answering = {dataset.corpus[passage] for own in answers.values() for passage in own}
    for near in (
        dict.fromkeys(passage for query in answers for passage in dataset.qrels[query] if passage in dataset.corpus),
        dict.fromkeys(passage for query in answers for passage in found[query]),
    ):
        hard = [passage for passage in near if passage not in chosen and dataset.corpus[passage] not in answering]
        chosen += chance.sample(hard, min(most - len(chosen), len(hard)))
    tries = chance.choices(corpus, k=20 * size)
    for passage in itertools.chain(
        tries, corpus
    ):  # the whole corpus in turn, where it is so small that luck does not do
        if len(chosen) == size:
            return chosen
        if passage not in chosen and dataset.corpus[passage] not in answering:
            chosen.append(passage)
    if len(chosen) < size:
        raise InvalidInputError(
            f"{dataset.name} has too few passages that do not answer for groups of {size}; ask for smaller ones"
        )
    return chosen


def _group(
    dataset: BeirDataset, cluster: Sequence[str], chosen: Sequence[str], logits: NDArray[np.float32] | None
) -> Group:
    """Look up the texts and judgements of a group; `logits` are the teacher's, (questions, passages)."""
    grades: list[tuple[float | None, ...]] = []
    targets: list[tuple[float, ...]] = []
    for row, query in enumerate(cluster):
        positives, judged = set(dataset.positives(query)), dataset.qrels[query]
        known: list[float | None] = [float(passage in positives) for passage in chosen]
        if logits is not None:
            marks = [round(float(mark), 4) for mark in logits[row]]
            limit = SHARE_OF_POSITIVE * min(mark for mark, grade in zip(marks, known, strict=True) if grade)
            for place, passage in enumerate(chosen):
                if passage not in judged and marks[place] >= limit:
                    known[place] = None
            best = max(marks)
            targets.append(
                tuple(
                    best if grade else min(mark, best - JUDGED_BELOW) if passage in judged else mark
                    for passage, mark, grade in zip(chosen, marks, known, strict=True)
                )
            )
        grades.append(tuple(known))
    return Group(
        tuple(dataset.queries[query] for query in cluster),
        tuple(dataset.corpus[passage] for passage in chosen),
        tuple(grades),
        None if logits is None else tuple(targets),
    )
