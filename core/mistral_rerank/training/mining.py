"""Mine training groups from judged questions: hard negatives, filtered by a teacher if there is one.

Questions for which the first stage retrieves each other's answers share a group, so the answer of one is a hard
negative of the others. The rest of a group are passages that the first stage ranks high, and random ones. With a
reranker the hard negatives are the passages that it ranks high. A teacher then scores all pairs of a group, for
distillation. Unjudged passages that score nearly as high as the positive count as unknown, because many of them are
relevant (positive-aware mining, arXiv 2407.15831).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.datasets import load_beir, qrels_files
from mistral_rerank.evaluation.first_stage import BM25Stage
from mistral_rerank.training.groups import Group, read_groups
from mistral_rerank.training.teacher import teach

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from mistral_rerank.evaluation.datasets import BeirDataset
    from mistral_rerank.evaluation.encoders import Encoder
    from mistral_rerank.evaluation.first_stage import FirstStage
    from mistral_rerank.reranker import Reranker
    from mistral_rerank.training.settings import TrainSettings
    from mistral_rerank.training.teacher import Drawn, Teaching

SHARE_OF_POSITIVE = 0.95
"""An unjudged passage with at least this share of the positive's teacher score counts as unknown."""
JUDGED_BELOW = 5.0
"""The teacher's logits of passages judged not relevant lie at least this far below the best logit."""


def load_split(folder: Path, *splits: str) -> BeirDataset:
    """Read a BEIR folder; if it has several judged splits, the first of `splits` that exists."""
    existing = qrels_files(folder)
    split = next((name for name in splits if name in existing), None) if len(existing) > 1 else None
    return load_beir(folder, split=split)


def load_groups(source: Path, settings: TrainSettings, *splits: str) -> list[Group]:
    """Read a `.jsonl` of groups, or mine the groups of a BEIR folder, as the settings say.

    Args:
        source: the file or folder.
        settings: number of questions and passages of a mined group, `max_queries` and `seed`.
        splits: as in `load_split`.

    Raises:
        InvalidInputError: the source cannot be read, or is too small.

    """
    if source.suffix != ".jsonl":
        return mine(
            load_split(source, *splits),
            questions=settings.questions,
            negatives=settings.negatives,
            random_negatives=settings.random_negatives,
            max_queries=settings.max_queries,
            seed=settings.seed,
        ).groups
    groups = read_groups(source)
    if settings.max_queries is None:
        return groups
    random.Random(f"{settings.seed}/{source.name}").shuffle(groups)  # noqa: S311 - sampling, not security
    counts = itertools.accumulate(len(group.queries) for group in groups)
    sample = groups[: sum(count <= settings.max_queries for count in counts)]
    if not sample:
        raise InvalidInputError(
            f"each group of {source} has more than {settings.max_queries} questions; raise max_queries"
        )
    return sample


@dataclass(frozen=True, slots=True)
class Mined:
    """The groups of one data set.

    Attributes:
        groups: questions with passages, with the teacher's logits in `teacher`.
        short: number of questions with fewer known negatives than requested.
        teaching: weights and quality of the teacher; None without one.

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
    """Mine the groups of a data set; every question is in at most one.

    Args:
        dataset: judged questions and their corpus.
        teacher: the bi-encoder of the teacher; None for groups without teacher scores.
        first_stage: retrieves the negatives; None for BM25.
        reranker: reranks the `depth` candidates of the first stage; negatives come from the upper half.
        questions: per group. An incomplete last group is dropped.
        negatives: hard negatives of a group; random passages replace them if there are too few, or if questions share
            an answer.
        random_negatives: passages of a group drawn from the whole corpus.
        depth: candidates of a question that negatives are drawn from.
        max_queries: questions at most.
        seed: the same seed gives the same groups.
        progress: called with the number of questions just done.

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
    rng = random.Random(f"{seed}/{dataset.name}")  # noqa: S311 - sampling, not security
    answers = {query: [p for p in dataset.positives(query) if p in dataset.corpus] for query in dataset.queries}
    ids = [query for query in dataset.queries if answers[query]]
    rng.shuffle(ids)
    ids = ids[:max_queries]
    if len(ids) < questions:
        raise InvalidInputError(
            f"{dataset.name} has {len(ids)} questions with an answer in its corpus, too few for groups of {questions}"
        )
    rankings = (first_stage or BM25Stage()).search(dataset, ids, k=depth, progress=lambda *_: None)
    candidates = {query: [passage for passage, _ in ranking] for query, ranking in zip(ids, rankings, strict=True)}
    if reranker is not None:
        for query, passages in candidates.items():
            ranked = reranker.rank(dataset.queries[query], [dataset.corpus[passage] for passage in passages])
            candidates[query] = [passages[score.index] for score in ranked[: (len(passages) + 1) // 2]]
    corpus = list(dataset.corpus)
    drawn: list[Drawn] = [
        (cluster, _passages(dataset, {q: answers[q] for q in cluster}, candidates, corpus, negatives, size, rng))
        for cluster in _clusters(answers, ids, candidates, questions)
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


def _clusters(
    answers: dict[str, list[str]], ids: Sequence[str], candidates: dict[str, list[str]], size: int
) -> list[tuple[str, ...]]:
    """Cluster questions whose candidates contain each other's answers; every question is in at most one cluster.

    At most two questions of a cluster share an answer, so that the other answers stay negatives. Clusters that are
    too small are filled up with any questions.
    """
    questions_of: dict[str, list[str]] = {}
    for query in ids:
        for passage in answers[query]:
            questions_of.setdefault(passage, []).append(query)
    free = dict.fromkeys(ids)
    clusters = []
    while len(free) >= size:
        cluster = [next(iter(free))]
        del free[cluster[0]]
        used = list(answers[cluster[0]])
        for member in cluster:  # grows while it is iterated
            for other in (query for passage in candidates[member] for query in questions_of.get(passage, ())):
                if len(cluster) == size:
                    break
                if other in free and all(used.count(passage) < 2 for passage in answers[other]):
                    del free[other]
                    cluster.append(other)
                    used += answers[other]
        cluster += [free.popitem()[0] for _ in range(size - len(cluster))]
        clusters.append(tuple(cluster))
    return clusters


def _passages(
    dataset: BeirDataset,
    answers: dict[str, list[str]],
    candidates: dict[str, list[str]],
    corpus: Sequence[str],
    negatives: int,
    size: int,
    rng: random.Random,
) -> list[str]:
    """Give the passage ids of a group: an answer of each question, then hard negatives, then random ones.

    Passages judged not relevant are the first hard negatives, candidates the next. A passage with the same text as an
    answer is no negative.
    """
    chosen: list[str] = []
    for positives in answers.values():
        if not any(passage in chosen for passage in positives):
            chosen.append(rng.choice(positives))
    limit = len(chosen) + negatives
    answering = {dataset.corpus[passage] for positives in answers.values() for passage in positives}
    for pool in (
        dict.fromkeys(passage for query in answers for passage in dataset.qrels[query] if passage in dataset.corpus),
        dict.fromkeys(passage for query in answers for passage in candidates[query]),
    ):
        hard = [passage for passage in pool if passage not in chosen and dataset.corpus[passage] not in answering]
        chosen += rng.sample(hard, min(limit - len(chosen), len(hard)))
    # random passages, then the corpus in order, in case it is so small that the random ones do not suffice
    for passage in itertools.chain(rng.choices(corpus, k=20 * size), corpus):
        if len(chosen) == size:
            break
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
    """Build a group from ids and the teacher's logits, (questions, passages)."""
    grades: list[tuple[float | None, ...]] = []
    targets: list[tuple[float, ...]] = []
    for row, query in enumerate(cluster):
        positives, judged = set(dataset.positives(query)), dataset.qrels[query]
        known: list[float | None] = [float(passage in positives) for passage in chosen]
        if logits is not None:
            scores = [round(float(score), 4) for score in logits[row]]
            limit = SHARE_OF_POSITIVE * min(score for score, grade in zip(scores, known, strict=True) if grade)
            for column, passage in enumerate(chosen):
                if passage not in judged and scores[column] >= limit:
                    known[column] = None
            best = max(scores)
            targets.append(
                tuple(
                    best if grade else min(score, best - JUDGED_BELOW) if passage in judged else score
                    for passage, score, grade in zip(chosen, scores, known, strict=True)
                )
            )
        grades.append(tuple(known))
    return Group(
        tuple(dataset.queries[query] for query in cluster),
        tuple(dataset.corpus[passage] for passage in chosen),
        tuple(grades),
        None if logits is None else tuple(targets),
    )
