import pytest
import torch
from torch.nn import functional

from mistral_rerank.training.losses import bce, distillation, group_loss, infonce


@pytest.fixture
def logits():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_bce_is_the_binary_cross_entropy_of_every_pair(logits):
    labels = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(5, 4)
    expected = functional.binary_cross_entropy(logits.sigmoid(), labels)
    assert bce(logits).item() == pytest.approx(expected.item(), abs=1e-6)


def test_infonce_is_the_negative_log_share_of_the_first_passage(logits):
    expected = -logits.softmax(dim=1)[:, 0].log().mean()
    assert infonce(logits).item() == pytest.approx(expected.item(), abs=1e-6)


def test_losses_are_named_and_can_be_added(logits):
    assert group_loss(logits, "bce") == bce(logits)
    assert group_loss(logits, "infonce") == infonce(logits)
    assert group_loss(logits, "bce+infonce") == bce(logits) + infonce(logits)


def test_distillation_is_the_divergence_from_the_teachers_softmax(logits):
    teacher = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    wanted, found = teacher.softmax(dim=1), logits.softmax(dim=1)
    expected = (wanted * (wanted / found).log()).sum(dim=1).mean()
    assert distillation(logits, teacher).item() == pytest.approx(expected.item(), abs=1e-6)
    assert distillation(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_adds_its_share(logits):
    teacher = logits.flip(1)
    added = group_loss(logits, "bce", teacher, 0.5) - group_loss(logits, "bce")
    assert added.item() == pytest.approx(0.5 * distillation(logits, teacher).item(), abs=1e-6)
