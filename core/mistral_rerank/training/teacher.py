"""What a teacher makes of a group: a bi-encoder's similarities and BM25's, weighed as the judgements say.

Neither is the better one everywhere: a bi-encoder misses the passage that repeats a question's rare words, BM25 the
one that says the same in others. Their weighted sum ranks better than both (docs/mini.md), and its weights are fitted
on the judged questions of the data set, so that it is a softmax that means something, ready to be distilled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mistral_rerank.evaluation.first_stage import BM25

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from mistral_rerank.evaluation.beir import BeirDataset
    from mistral_rerank.evaluation.encoders import Encoder

Drawn = tuple[tuple[str, ...], list[str]]
"""The query ids and passage ids of a group."""

USUAL_WEIGHTS = (15.0, 5.0)
"""Of the cosine and of BM25, where there are few judgements to learn from: the fit is drawn to them."""
GROUPS_AT_ONCE = 8
"""Groups whose texts the bi-encoder reads in one call."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a teacher makes of the groups of a data set.

    Attributes:
        logits: (questions, passages) of every group.
        weights: of the bi-encoder's cosine and of BM25's score, relative to the question's best, in the logits.
        first: the share of questions for which an answer has the highest logit of the group.
        first_alone: the same by the bi-encoder alone.

    """

    logits: list[NDArray[np.float32]]
    weights: tuple[float, float]
    first: float
    first_alone: float

    def __str__(self) -> str:
        cosine, bm25 = self.weights
        return (
            f"teacher: {cosine:.1f} cosine + {bm25:.1f} BM25, puts an answer first for {self.first:.0%} of the "
            f"questions (bi-encoder alone {self.first_alone:.0%})"
        )


def teach(
    dataset: BeirDataset,
    drawn: Sequence[Drawn],
    encoder: Encoder,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Teaching:
    """Compare the questions of every group with its passages.

    Args:
        dataset: holds the texts and judgements.
        drawn: groups, all of the same number of passages.
        encoder: the bi-encoder.
        progress: is told how many more questions are done.

    """
    bm25, place = BM25(dataset.corpus), {passage: i for i, passage in enumerate(dataset.corpus)}
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(drawn), GROUPS_AT_ONCE):
        some = drawn[start : start + GROUPS_AT_ONCE]
        for (queries, passages), cosines in zip(some, _cosines(dataset, some, encoder), strict=True):
            columns = [place[passage] for passage in passages]
            shares = np.stack([bm25.shares(dataset.queries[query])[columns] for query in queries])
            found.append(np.stack([cosines, shares], axis=-1).astype(np.float32))
            progress(len(queries))
    answers = [
        np.array([[passage in dataset.positives(query) for passage in passages] for query in queries], np.float32)
        for queries, passages in drawn
    ]
    similarities, answering = np.concatenate(found), np.concatenate(answers)
    weights = fit_weights(similarities, answering)

    def first(weights: tuple[float, float]) -> float:
        best = (similarities @ np.array(weights, np.float32)).argmax(-1)
        return float(np.take_along_axis(answering, best[:, None], -1).mean())

    logits = [group @ np.array(weights, np.float32) for group in found]
    return Teaching(logits, weights, first(weights), first((1.0, 0.0)))


def _cosines(dataset: BeirDataset, drawn: Sequence[Drawn], encoder: Encoder) -> list[NDArray[np.float32]]:
    """Multiply the vectors of every question and passage of each group; each text is read once."""
    queries = list(dict.fromkeys(query for cluster, _ in drawn for query in cluster))
    passages = list(dict.fromkeys(passage for _, chosen in drawn for passage in chosen))
    asked = encoder.encode([dataset.queries[query] for query in queries], "query", progress=lambda _: None)
    read = encoder.encode([dataset.corpus[passage] for passage in passages], "passage", progress=lambda _: None)
    of_query, of_passage = dict(zip(queries, asked, strict=True)), dict(zip(passages, read, strict=True))
    return [
        np.stack([of_query[query] for query in cluster]) @ np.stack([of_passage[passage] for passage in chosen]).T
        for cluster, chosen in drawn
    ]


def fit_weights(similarities: NDArray[np.float32], answers: NDArray[np.float32]) -> tuple[float, float]:
    """Find the weights under which a softmax over its passages says best which of them answer a question.

    They are positive, and drawn to `USUAL_WEIGHTS` (normally distributed around their logarithms, by a factor of e),
    which a handful of questions outweighs.

    Args:
        similarities: (questions, passages, 2), the bi-encoder's and BM25's.
        answers: (questions, passages), 1 for passages that answer; at least one in each row.

    """
    told, target = torch.from_numpy(similarities).double(), torch.from_numpy(answers).double()
    target = target / target.sum(-1, keepdim=True)
    usual = torch.tensor([math.log(weight) for weight in USUAL_WEIGHTS], dtype=torch.float64)
    logs = usual.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        misfit = -(target * (told @ logs.exp()).log_softmax(-1)).sum() + ((logs - usual) ** 2).sum() / 2
        misfit.backward()  # type: ignore[no-untyped-call]
        return misfit

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    cosine, bm25 = logs.detach().exp().tolist()
    return cosine, bm25
