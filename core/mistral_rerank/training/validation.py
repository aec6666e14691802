"""Validation metric: nDCG over the passages of a group."""

from __future__ import annotations

import torch


def ndcg(logits: torch.Tensor, grades: torch.Tensor, *, k: int = 10) -> torch.Tensor:
    """Give the nDCG of every question's passages, without those of unknown grade.

    Args:
        logits: (questions, passages) float32.
        grades: (questions, passages) float32, NaN if unknown; every question has one above 0.
        k: rank cutoff.

    Returns:
        (questions,) float32. The gain is the grade, as in trec_eval.

    """
    known = ~grades.isnan()
    gains = grades.nan_to_num(0.0)
    order = logits.masked_fill(~known, float("-inf")).argsort(stable=True, descending=True)[:, :k]
    discounts = 1 / torch.arange(2, 2 + order.shape[1], device=logits.device).log2()
    best = gains.sort(-1, descending=True).values[:, :k]
    return (gains.gather(-1, order) * discounts).sum(-1) / (best * discounts).sum(-1)
