"""`retriever_weight`: fitted on the scores of one evaluation, and reported on the questions of another."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mistral_rerank.blending import blended_order
from mistral_rerank.data_files.text import text_lines
from mistral_rerank.errors import InvalidInputError
from mistral_rerank.evaluation.metrics import interval, mean, per_query, resampled_means
from mistral_rerank.evaluation.run_files import distinct, read_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mistral_rerank.evaluation.metrics import Interval
    from mistral_rerank.evaluation.run_files import Run
    from mistral_rerank.evaluation.workspace import Scored

WEIGHTS = tuple(step / 20 for step in range(20))
"""The weights that are tried: 0 to 0.95."""
DEPTH = 10
MEASURE = "nDCG@10"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one question in first-stage order: both stages' scores, and labels of 0 or 1."""

    retriever_scores: tuple[float, ...]
    logits: tuple[float, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Blended:
    """nDCG@10 of a set, or of the mean of all sets, with the fitted weight; the gain is over reranking alone."""

    name: str
    weight: float
    reranked: float
    blended: float
    gain: Interval


def read_candidates(results: Path) -> dict[str, list[Candidates]]:
    """Read the candidates of every set of a finished evaluation.

    Raises:
        InvalidInputError: it is no folder of an evaluation.

    """
    sets = {}
    for file in sorted((results / "scores").glob("*.jsonl")):
        run = read_run(results / "first_stage" / f"{file.stem}.trec")
        sets[file.stem] = [
            Candidates(
                tuple(score for _, score in run.get(record["query"], [])),
                tuple(record["logits"]),
                tuple(record["labels"]),
            )
            for record in map(json.loads, text_lines(file))
        ]
    if not sets:
        raise InvalidInputError(f"{results} holds no scores/*.jsonl; give the folder that an evaluation has written")
    return sets


def fit_weight(sets: Mapping[str, Sequence[Candidates]]) -> float:
    """Give the weight with the highest mean nDCG@10 over the sets; of equal ones the lowest.

    Only questions with a relevant candidate count, and the ideal ranking is that of the candidates.

    Raises:
        InvalidInputError: no question has a relevant candidate.

    """
    usable = [[each for each in questions if any(each.labels)] for questions in sets.values()]
    usable = [questions for questions in usable if questions]
    if not usable:
        raise InvalidInputError("no question has a relevant candidate, so no weight can be fitted; give another split")
    return max(WEIGHTS, key=lambda weight: (np.mean([_quality(questions, weight) for questions in usable]), -weight))


def blended_runs(before: Run, scored: Mapping[str, Scored], weight: float) -> Run:
    """Give the blended ranking of every question; its scores are negative ranks."""
    runs = {}
    for query, ranking in before.items():
        order = blended_order(scored[query].logits, [score for _, score in ranking], weight)
        runs[query] = distinct((ranking[position][0], float(-rank)) for rank, position in enumerate(order))
    return runs


def compare(
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]],
    reranked: Mapping[str, Run],
    blended: Mapping[str, Run],
    *,
    weight: float,
    seed: int,
) -> list[Blended]:
    """Compare blended with reranked runs, by set; the mean of the sets comes last."""
    rows, resampled = [], []
    for name, judged in qrels.items():
        old, new = per_query(judged, reranked[name]), per_query(judged, blended[name])
        differences = [new[query][MEASURE] - old[query][MEASURE] for query in judged]
        means = resampled_means(differences, seed=seed, name=name)
        resampled.append(means)
        gain = interval(float(np.mean(differences)), means)
        rows.append(Blended(name, weight, mean(old, MEASURE), mean(new, MEASURE), gain))
    center = float(np.mean([row.gain.mean for row in rows]))
    before, after = (float(np.mean([getattr(row, column) for row in rows])) for column in ("reranked", "blended"))
    return [*rows, Blended("mean", weight, before, after, interval(center, np.mean(resampled, axis=0)))]


def _quality(questions: Sequence[Candidates], weight: float) -> float:
    """Give the mean nDCG@10 of binary labels."""
    return float(np.mean([_ndcg(question, weight) for question in questions]))


def _ndcg(question: Candidates, weight: float) -> float:
    order = blended_order(question.logits, question.retriever_scores, weight)
    gains = [question.labels[position] for position in order]
    return _dcg(gains) / _dcg(sorted(gains, reverse=True))


def _dcg(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:DEPTH]))
