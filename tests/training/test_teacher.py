import numpy as np
import pytest

from mistral_rerank.evaluation.datasets import BeirDataset
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.training.teacher import PRIOR_WEIGHTS, fit_weights, teach


class Bags:
    """A bi-encoder that knows three words."""

    def encode(self, texts, kind, *, progress):
        progress(len(texts))
        counts = np.array([[text.count(word) for word in ("ice", "sun", "water")] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def judged(similarities, weights, rng):
    """Draw the passage that answers from the softmax of the weighted similarities."""
    logits = similarities @ np.array(weights, np.float32)
    noise = rng.gumbel(size=logits.shape)
    return np.eye(logits.shape[1], dtype=np.float32)[(logits + noise).argmax(-1)]


@pytest.mark.parametrize("weights", [(20.0, 2.0), (6.0, 9.0)])
def test_the_weights_that_generated_the_judgements_are_recovered(rng, weights):
    similarities = rng.random((4000, 12, 2), dtype=np.float32)
    assert fit_weights(similarities, judged(similarities, weights, rng)) == pytest.approx(weights, rel=0.08)


def test_an_uninformative_similarity_gets_no_weight(rng):
    similarities = rng.random((1000, 12, 2), dtype=np.float32)
    cosine, bm25 = fit_weights(similarities, judged(similarities, (15.0, 0.0), rng))
    assert cosine == pytest.approx(15, rel=0.1)
    assert bm25 < 0.3


def test_weights_stay_finite_where_a_few_judgements_agree_with_both():
    similarities = np.array([[[0.9, 1.0], [0.1, 0.0]]] * 3, np.float32)
    answers = np.array([[1, 0]] * 3, np.float32)
    assert fit_weights(similarities, answers) == pytest.approx(PRIOR_WEIGHTS, rel=0.01)


def test_the_logits_are_the_weighted_sum_of_cosine_and_bm25():
    corpus = {"a": "ice on water", "b": "the sun burns", "c": "ice and sun", "d": "water, water"}
    queries = {"q": "is there ice on water", "r": "what makes the sun burn"}
    dataset = BeirDataset("sky", corpus, queries, {"q": {"a": 1}, "r": {"b": 1}})
    drawn = [(("q", "r"), ["a", "b", "c"]), (("r",), ["d", "b", "a"])]
    done = []
    teaching = teach(dataset, drawn, Bags(), progress=done.append)
    cosine, bm25 = teaching.weights
    assert done == [2, 1]
    assert [logits.shape for logits in teaching.logits] == [(2, 3), (1, 3)]
    for (group_queries, passages), logits in zip(drawn, teaching.logits, strict=True):
        for query, row in zip(group_queries, logits, strict=True):
            vectors = Bags().encode(
                [queries[query], *(corpus[p] for p in passages)], "passage", progress=lambda _: None
            )
            (ranking,) = BM25(corpus).search([queries[query]], k=4)
            shares = [dict(ranking).get(passage, 0.0) / ranking[0][1] for passage in passages]
            assert row == pytest.approx(cosine * vectors[1:] @ vectors[0] + bm25 * np.array(shares), abs=1e-4)


def test_accuracy_is_measured_with_and_without_bm25():
    corpus = {"a": "the sun", "b": "water in the sun turns to vapour", "c": "ice"}
    dataset = BeirDataset("sky", corpus, {"q": "sun vapour", "r": "ice"}, {"q": {"b": 1}, "r": {"c": 1}})
    teaching = teach(dataset, [(("q", "r"), ["a", "b", "c"])], Bags())
    assert (teaching.accuracy, teaching.encoder_accuracy) == (1.0, 0.5)


def test_a_question_without_a_word_of_the_corpus_has_no_share():
    bm25 = BM25({"a": "ice", "b": "sun"})
    assert bm25.shares("moon").tolist() == bm25.shares("the").tolist() == [0.0, 0.0]
    assert bm25.shares("ice").tolist() == [1.0, 0.0]
