import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytrec_eval import RelevanceEvaluator

from mistral_rerank.training.validation import ndcg

NAN = float("nan")
grade = st.sampled_from([0.0, 1.0, 2.0])


@given(st.lists(st.tuples(st.integers(-20, 20), grade), min_size=2, max_size=30, unique_by=lambda pair: pair[0]))
def test_it_is_that_of_trec_eval(pairs):
    if not any(relevance for _, relevance in pairs):
        pairs[0] = (pairs[0][0], 1.0)
    logits, grades = (torch.tensor([column], dtype=torch.float32) for column in zip(*pairs, strict=True))
    run = {"q": {str(i): float(logit) for i, (logit, _) in enumerate(pairs)}}
    qrels = {"q": {str(i): int(relevance) for i, (_, relevance) in enumerate(pairs)}}
    expected = RelevanceEvaluator(qrels, {"ndcg_cut_10"}).evaluate(run)["q"]["ndcg_cut_10"]
    assert ndcg(logits, grades).item() == pytest.approx(expected, abs=1e-6)


def test_passages_of_unknown_grade_are_left_out():
    logits = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, 3.0]])
    grades = torch.tensor([[NAN, 1.0, 0.0], [1.0, NAN, 0.0]])
    without = torch.stack([ndcg(logits[:1, 1:], grades[:1, 1:])[0], ndcg(logits[1:, ::2], grades[1:, ::2])[0]])
    assert torch.equal(ndcg(logits, grades), without)
    assert without.tolist() == pytest.approx([1.0, 0.6309], abs=1e-4)
