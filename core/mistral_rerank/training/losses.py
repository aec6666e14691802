"""What training minimizes: functions of the logits of groups whose first passage is the relevant one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch.nn import functional

if TYPE_CHECKING:
    import torch

Loss = Literal["bce", "infonce", "bce+infonce"]


def bce(logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of every pair on its own, as in the card of rerank-qa-mistral-4b.

    It teaches probabilities: sigmoid(logit) estimates how likely it is that the passage answers.

    Args:
        logits: (groups, passages), the relevant passage first.

    """
    labels = logits.new_zeros(logits.shape)
    labels[:, 0] = 1.0
    return functional.binary_cross_entropy_with_logits(logits, labels)


def infonce(logits: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy within each group (arXiv 2409.07691, section 4): it teaches the order."""
    return functional.cross_entropy(logits, logits.new_zeros(len(logits)).long())


def distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's softmax over each group to the model's.

    Args:
        logits: (groups, passages).
        teacher: (groups, passages), the teacher's logits.

    """
    return functional.kl_div(
        logits.log_softmax(-1), teacher.to(logits).log_softmax(-1), reduction="batchmean", log_target=True
    )


def group_loss(
    logits: torch.Tensor, loss: Loss, teacher: torch.Tensor | None = None, distill: float = 1.0
) -> torch.Tensor:
    """Give the named loss, a scalar; "bce+infonce" is their plain sum.

    Where there is a teacher, `distill` times its divergence is added.
    """
    total = logits.new_zeros(())
    if loss != "infonce":
        total = total + bce(logits)
    if loss != "bce":
        total = total + infonce(logits)
    if teacher is not None:
        total = total + distill * distillation(logits, teacher)
    return total
