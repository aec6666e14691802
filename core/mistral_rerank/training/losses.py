"""What training minimizes: functions of the logits of questions with their passages, and of what is known of them.

Grades and logits are (questions, passages) float32; a grade is 1 for a passage that answers, 0 for one that does
not, and NaN for one that nobody judged, which counts nowhere but in the distillation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch.nn import functional

if TYPE_CHECKING:
    import torch

Loss = Literal["bce", "infonce", "bce+infonce"]

FAR_BELOW = -1e4
"""Takes a passage out of a softmax; minus infinity would make a gradient of nothing but such passages NaN."""


def bce(logits: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of every known pair on its own, as in the card of rerank-qa-mistral-4b.

    It teaches probabilities: sigmoid(logit) estimates how likely it is that the passage answers.
    """
    known = ~grades.isnan()
    return functional.binary_cross_entropy_with_logits(logits[known], grades[known])


def infonce(logits: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy of every positive against the passages of a lower grade: it teaches the order.

    With one positive a question it is the loss of arXiv 2409.07691, section 4; other positives of the question are
    left out of each one's softmax. Positives count by their grade.
    """
    lower = grades[:, None, :] < grades[:, :, None]  # (questions, positives, passages)
    against = logits[:, None, :].masked_fill(~lower, FAR_BELOW).logsumexp(-1)
    weights = grades.nan_to_num(0.0) * lower.any(-1)
    losses = functional.softplus(against - logits).masked_fill(weights == 0, 0.0)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-9)


def distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's softmax over each question's passages to the model's.

    Args:
        logits: (questions, passages).
        teacher: (questions, passages), the teacher's logits.

    """
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
    """Give the named loss, a scalar; "bce+infonce" is their plain sum.

    Where there is a teacher, `distill` times its divergence is added.
    """
    total = logits.new_zeros(())
    if loss != "infonce":
        total = total + bce(logits, grades)
    if loss != "bce":
        total = total + infonce(logits, grades)
    if teacher is not None:
        total = total + distill * distillation(logits, teacher)
    return total
