"""Losses and the validation metric of groups.

Logits and grades are (questions, passages) float32. A grade is 1 for a relevant passage, 0 for an irrelevant one, and
NaN for an unjudged one, which counts only in the distillation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from mistral_rerank.training.settings import Loss

FAR_BELOW = -1e4
"""Masks a passage in a softmax. With minus infinity, a row of only such passages would have a NaN gradient."""


def bce(logits: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """Give the binary cross-entropy of the judged pairs, as in the card of rerank-qa-mistral-4b.

    It trains probabilities: sigmoid(logit) estimates the probability that the passage is relevant.
    """
    known = ~grades.isnan()
    return functional.binary_cross_entropy_with_logits(logits[known], grades[known])


def infonce(logits: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """Give the softmax cross-entropy of every positive against the passages of a lower grade; it trains the order.

    With one positive per question it is the loss of arXiv 2409.07691, section 4. Other positives of the question are
    masked. Positives are weighted by their grade.
    """
    lower = grades[:, None, :] < grades[:, :, None]  # (questions, positives, passages)
    against = logits[:, None, :].masked_fill(~lower, FAR_BELOW).logsumexp(-1)
    weights = grades.nan_to_num(0.0) * lower.any(-1)
    losses = functional.softplus(against - logits).masked_fill(weights == 0, 0.0)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Give the Kullback-Leibler divergence of softmax(logits) over each question's passages from softmax(teacher)."""
    return functional.kl_div(
        logits.log_softmax(-1), teacher.to(logits).log_softmax(-1), reduction="batchmean", log_target=True
    )


def group_loss(
    logits: torch.Tensor,
    grades: torch.Tensor,
    loss: Loss,
    teacher: torch.Tensor | None = None,
    distill: float = 1.0,
) -> torch.Tensor:
    """Give the named loss, a scalar; "bce+infonce" is their sum.

    With the logits of a teacher, `distill` times the divergence from them is added.
    """
    total = logits.new_zeros(())
    if loss != "infonce":
        total = total + bce(logits, grades)
    if loss != "bce":
        total = total + infonce(logits, grades)
    if teacher is not None:
        total = total + distill * distillation(logits, teacher)
    return total


def ndcg(logits: torch.Tensor, grades: torch.Tensor, *, k: int = 10) -> torch.Tensor:
    """Give the nDCG@k of every question, (questions,) float32, without the unjudged passages.

    The gain is the grade, as in trec_eval. Every question has a grade above 0.
    """
    gains = grades.nan_to_num(0.0)
    order = logits.masked_fill(grades.isnan(), float("-inf")).argsort(stable=True, descending=True)[:, :k]
    discounts = 1 / torch.arange(2, 2 + order.shape[1], device=logits.device).log2()
    best = gains.sort(-1, descending=True).values[:, :k]
    return (gains.gather(-1, order) * discounts).sum(-1) / (best * discounts).sum(-1)
