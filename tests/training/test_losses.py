import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytrec_eval import RelevanceEvaluator
from torch.nn import functional

from mistral_rerank.training.losses import bce, distillation, group_loss, infonce, ndcg

UNKNOWN = float("nan")


@pytest.fixture
def logits():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def first():
    """Only the first passage of every question answers it."""
    return torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(5, 4)


def test_bce_is_the_binary_cross_entropy_of_every_pair(logits, first):
    expected = functional.binary_cross_entropy(logits.sigmoid(), first)
    assert bce(logits, first).item() == pytest.approx(expected.item(), abs=1e-6)


def test_infonce_is_the_negative_log_share_of_the_positive(logits, first):
    expected = functional.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    assert infonce(logits, first).item() == pytest.approx(expected.item(), abs=1e-6)


def test_an_unjudged_pair_counts_in_neither(logits, first):
    grades = first.clone()
    grades[:, 3] = UNKNOWN
    assert bce(logits, grades).item() == pytest.approx(bce(logits[:, :3], first[:, :3]).item(), abs=1e-6)
    assert infonce(logits, grades).item() == pytest.approx(infonce(logits[:, :3], first[:, :3]).item(), abs=1e-6)


def test_positives_of_one_question_do_not_compete(logits):
    grades = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(5, 4)
    one, other = (infonce(logits[:, [positive, 2, 3]], torch.tensor([[1.0, 0, 0]]).expand(5, 3)) for positive in (0, 1))
    assert infonce(logits, grades).item() == pytest.approx(((one + other) / 2).item(), abs=1e-6)


def test_a_partly_relevant_passage_ranks_between_the_others():
    grades = torch.tensor([[1.0, 0.5, 0.0]])
    right, wrong = torch.tensor([[4.0, 0.0, -4.0]]), torch.tensor([[0.0, 4.0, -4.0]])
    assert infonce(right, grades) < 0.1 < 1 < infonce(wrong, grades)


def test_a_question_without_a_negative_adds_nothing_and_no_nan(logits):
    grades = torch.tensor([[1.0, UNKNOWN, UNKNOWN, UNKNOWN]]).repeat(5, 1)
    grades[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    logits.requires_grad_()
    loss = infonce(logits, grades)
    assert loss.item() == pytest.approx(-logits[0].log_softmax(0)[0].item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert not gradient[1:].any()


def test_losses_are_named_and_can_be_added(logits, first):
    assert group_loss(logits, first, "bce") == bce(logits, first)
    assert group_loss(logits, first, "infonce") == infonce(logits, first)
    assert group_loss(logits, first, "bce+infonce") == bce(logits, first) + infonce(logits, first)


def test_distillation_is_the_divergence_from_the_teachers_softmax(logits):
    teacher = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    target, prediction = teacher.softmax(dim=1), logits.softmax(dim=1)
    expected = (target * (target / prediction).log()).sum(dim=1).mean()
    assert distillation(logits, teacher).item() == pytest.approx(expected.item(), abs=1e-6)
    assert distillation(logits + 3, logits).item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_adds_its_share(logits, first):
    teacher = logits.flip(1)
    added = group_loss(logits, first, "bce", teacher, 0.5) - group_loss(logits, first, "bce")
    assert added.item() == pytest.approx(0.5 * distillation(logits, teacher).item(), abs=1e-6)


grade = st.sampled_from([0.0, 1.0, 2.0])


@given(st.lists(st.tuples(st.integers(-20, 20), grade), min_size=2, max_size=30, unique_by=lambda pair: pair[0]))
def test_ndcg_is_that_of_trec_eval(pairs):
    if not any(relevance for _, relevance in pairs):
        pairs[0] = (pairs[0][0], 1.0)
    logits, grades = (torch.tensor([column], dtype=torch.float32) for column in zip(*pairs, strict=True))
    run = {"q": {str(i): float(logit) for i, (logit, _) in enumerate(pairs)}}
    qrels = {"q": {str(i): int(relevance) for i, (_, relevance) in enumerate(pairs)}}
    expected = RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)["q"]["ndcg_cut_10"]
    assert ndcg(logits, grades).item() == pytest.approx(expected, abs=1e-6)


def test_ndcg_leaves_out_passages_of_unknown_grade():
    logits = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 3.0]])
    grades = torch.tensor([[UNKNOWN, 1.0, 0.0], [1.0, UNKNOWN, 0.0]])
    without = torch.stack([ndcg(logits[:1, 1:], grades[:1, 1:])[0], ndcg(logits[1:, ::2], grades[1:, ::2])[0]])
    assert torch.equal(ndcg(logits, grades), without)
    assert without.tolist() == pytest.approx([1.0, 0.6309], abs=1e-4)
