"""The teacher's logits: a weighted sum of a bi-encoder's cosine and BM25's score.

A bi-encoder misses passages that repeat a question's rare words. BM25 misses paraphrases. Their weighted sum ranks
better than both (docs/mini.md). The weights are fitted on the data set's judgements, so the softmax of the logits is
a calibrated target for distillation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mistral_rerank.calibration.fit import minimize
from mistral_rerank.evaluation.first_stage import BM25

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mistral_rerank.evaluation.datasets import BeirDataset
    from mistral_rerank.evaluation.encoders import Encoder, Kind

Drawn = tuple[tuple[str, ...], list[str]]
"""The query ids and passage ids of a group."""

PRIOR_WEIGHTS = (15.0, 5.0)
"""Prior weights of the cosine and of BM25, which decide if there are few judgements."""
GROUPS_PER_ENCODING = 8
"""Groups whose texts are encoded in one call."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """The teacher's logits for the groups of a data set, and how good they are.

    Attributes:
        logits: (questions, passages) of every group.
        weights: of the cosine, and of BM25's score divided by the question's best.
        accuracy: share of questions for which a relevant passage has the highest logit of the group.
        encoder_accuracy: the same with the bi-encoder alone.

    """

    logits: list[NDArray[np.float32]]
    weights: tuple[float, float]
    accuracy: float
    encoder_accuracy: float

    def __str__(self) -> str:
        cosine, bm25 = self.weights
        return (
            f"teacher: {cosine:.1f} cosine + {bm25:.1f} BM25, puts an answer first for {self.accuracy:.0%} of the "
            f"questions (bi-encoder alone {self.encoder_accuracy:.0%})"
        )


def teach(
    dataset: BeirDataset,
    drawn: Sequence[Drawn],
    encoder: Encoder,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Teaching:
    """Score the questions of every group against its passages.

    Args:
        dataset: holds the texts and judgements.
        drawn: groups, all of the same number of passages.
        encoder: the bi-encoder.
        progress: called with the number of questions just done.

    """
    bm25, column_of = BM25(dataset.corpus), {passage: i for i, passage in enumerate(dataset.corpus)}
    features: list[NDArray[np.float32]] = []
    for start in range(0, len(drawn), GROUPS_PER_ENCODING):
        block = drawn[start : start + GROUPS_PER_ENCODING]
        for (queries, passages), cosines in zip(block, _cosines(dataset, block, encoder), strict=True):
            columns = [column_of[passage] for passage in passages]
            shares = np.stack([bm25.shares(dataset.queries[query])[columns] for query in queries])
            features.append(np.stack([cosines, shares], axis=-1).astype(np.float32))
            progress(len(queries))
    similarities = np.concatenate(features)
    answers = np.array(
        [dataset.labels(query, passages) for queries, passages in drawn for query in queries], np.float32
    )
    weights = fit_weights(similarities, answers)

    def accuracy(weights: tuple[float, float]) -> float:
        best = (similarities @ np.array(weights, np.float32)).argmax(-1)
        return float(np.take_along_axis(answers, best[:, None], -1).mean())

    logits = [group @ np.array(weights, np.float32) for group in features]
    return Teaching(logits, weights, accuracy(weights), accuracy((1.0, 0.0)))


def _cosines(dataset: BeirDataset, drawn: Sequence[Drawn], encoder: Encoder) -> list[NDArray[np.float32]]:
    """Give the cosines (questions, passages) of each group; each text is encoded once."""

    def embeddings(texts: dict[str, str], kind: Kind, ids: list[str]) -> dict[str, NDArray[np.float32]]:
        distinct = list(dict.fromkeys(ids))
        vectors = encoder.encode([texts[name] for name in distinct], kind, progress=lambda _: None)
        return dict(zip(distinct, vectors, strict=True))

    query_vectors = embeddings(dataset.queries, "query", [query for queries, _ in drawn for query in queries])
    passage_vectors = embeddings(dataset.corpus, "passage", [passage for _, passages in drawn for passage in passages])
    return [
        np.stack([query_vectors[query] for query in queries]) @ np.stack([passage_vectors[name] for name in passages]).T
        for queries, passages in drawn
    ]


def fit_weights(similarities: NDArray[np.float32], answers: NDArray[np.float32]) -> tuple[float, float]:
    """Fit the weights of both similarities by softmax cross-entropy over the passages of each question.

    The weights are positive. Their prior is log-normal around `PRIOR_WEIGHTS` with a standard deviation of 1.

    Args:
        similarities: (questions, passages, 2), the bi-encoder's and BM25's.
        answers: (questions, passages), 1 for passages that answer; at least one in each row.

    """
    features, targets = torch.from_numpy(similarities).double(), torch.from_numpy(answers).double()
    targets = targets / targets.sum(-1, keepdim=True)
    prior = torch.tensor(PRIOR_WEIGHTS, dtype=torch.float64).log()

    def loss(logs: torch.Tensor) -> torch.Tensor:
        cross_entropy = -(targets * (features @ logs.exp()).log_softmax(-1)).sum()
        return (cross_entropy + ((logs - prior) ** 2).sum() / 2) / len(targets)

    cosine, bm25 = minimize(loss, prior.tolist())
    return math.exp(cosine), math.exp(bm25)
