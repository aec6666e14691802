"""`retriever_weight`, fitted on one evaluation and reported on another."""

import json

import pytest
from support import FACTS, LengthReranker

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.evaluate import evaluate
from mistral_rerank.evaluation.weights import Candidates, fit_weight, read_candidates
from mistral_rerank.evaluation.workspace import EvaluationSettings


def test_the_weight_follows_the_stage_that_knows_the_answer():
    first_stage = Candidates(retriever_scores=(0.1, 0.9, 0.2), logits=(3.0, 1.0, 2.0), labels=(0, 1, 0))
    reranker = Candidates(retriever_scores=(0.9, 0.1, 0.5), logits=(1.0, 3.0, 2.0), labels=(0, 1, 0))
    assert fit_weight({"set": [reranker] * 3}) == 0.0  # of equal weights the lowest
    assert fit_weight({"set": [first_stage] * 3}) > 0.5


def test_both_stages_together_can_be_better_than_either():
    # each stage alone puts another wrong passage first
    question = Candidates(retriever_scores=(0.0, 0.8, 1.0), logits=(3.0, 2.5, 0.0), labels=(0, 1, 0))
    assert 0.0 < fit_weight({"set": [question]}) < 1.0


def test_questions_without_a_relevant_candidate_do_not_count():
    lost = Candidates(retriever_scores=(0.1, 0.9), logits=(3.0, 1.0), labels=(0, 0))
    with pytest.raises(InvalidInputError, match="no question has a relevant candidate"):
        fit_weight({"set": [lost]})


def test_a_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="holds no scores"):
        read_candidates(tmp_path)


def test_an_evaluation_reports_the_weight_fitted_on_another(tmp_path):
    train, test = tmp_path / "train", tmp_path / "test"
    evaluate(LengthReranker(), EvaluationSettings(data=[FACTS], top_k=7, queries=12, seed=1), train)
    settings = EvaluationSettings(data=[FACTS], top_k=7, queries=12, seed=2, fit_weight=train)
    (figures, _) = evaluate(LengthReranker(), settings, test)
    results = json.loads((test / "results.json").read_text())
    assert results["settings"]["fit_weight"] == "train"
    of_set, mean = results["blended"]
    assert (of_set["name"], mean["name"]) == ("facts", "mean")
    assert of_set["weight"] == fit_weight(read_candidates(train)) >= 0.5  # a longer passage is no better answer
    assert of_set["reranked"] == pytest.approx(figures.reranked["nDCG@10"])
    assert of_set["blended"] > of_set["reranked"]
    assert of_set["gain"]["mean"] == pytest.approx(of_set["blended"] - of_set["reranked"])
    assert mean | {"name": "facts"} == of_set
