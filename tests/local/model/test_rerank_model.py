"""The batched path against transformers' own classifier, one pair at a time, float32, no padding."""

import random

import pytest
import torch
from support import model_logits, plain_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mistral_rerank import LocalReranker
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.rerank_model import RerankModel, pad
from mistral_rerank.templates import Template

TOLERANCE = 1e-4


def reference(folder, pairs):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = PairTokenizer(tokenizer, Template(), max_length=512).encode(pairs)
    return plain_logits(model, [pair.sequences[0] for pair in encoded])


@pytest.fixture(scope="module")
def expected(tiny, pairs):
    return reference(tiny, pairs)


def logits(scores):
    return [score.logit for score in scores]


def test_batches_equal_the_plain_loop(tiny_reranker, pairs, expected):
    assert max(expected) - min(expected) > 0.5, "the scores differ, so equality means something"
    assert logits(tiny_reranker.score_pairs(pairs)) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_scores_do_not_depend_on_the_batch_size(tiny, pairs, expected, batch_tokens):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", batch_tokens=batch_tokens) as reranker:
        assert logits(reranker.score_pairs(pairs)) == pytest.approx(expected, abs=TOLERANCE)


def test_scores_do_not_depend_on_the_width_of_padded_rows(tiny, monkeypatch):
    sequences = [[5], [6] * 3, [7] * 129]
    assert pad(sequences)[0].shape == (3, 129)
    assert pad(sequences, 8)[0].shape == (3, 136)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32).eval()
    model = RerankModel(classifier.base_model, classifier.score, torch.device("cpu"), packed=False)
    expected = plain_logits(classifier, sequences)
    assert model_logits(model, sequences) == pytest.approx(expected, abs=TOLERANCE)
    monkeypatch.setattr(model, "_width", 8)
    assert model_logits(model, sequences) == pytest.approx(expected, abs=TOLERANCE)


def test_scores_do_not_depend_on_the_input_order(tiny_reranker, pairs, expected):
    order = list(range(len(pairs)))
    random.Random(1).shuffle(order)
    shuffled = logits(tiny_reranker.score_pairs([pairs[i] for i in order]))
    assert shuffled == pytest.approx([expected[i] for i in order], abs=TOLERANCE)


def test_one_pair_and_a_thousand_pairs(tiny_reranker, pairs, expected):
    assert logits(tiny_reranker.score_pairs(pairs[:1])) == pytest.approx(expected[:1], abs=TOLERANCE)
    many = (pairs * 4)[:1000]
    assert logits(tiny_reranker.score_pairs(many)) == pytest.approx((expected * 4)[:1000], abs=TOLERANCE)


def test_equal_pairs_have_equal_scores_wherever_they_stand(tiny_reranker, pairs):
    scores = logits(tiny_reranker.score_pairs([pairs[0], *pairs[1:40], pairs[0]]))
    assert scores[0] == scores[-1]
    assert len(set(scores)) == len({*pairs[:40]})


def test_chunk_mode_gives_the_score_of_the_best_chunk(tiny, facts):
    passages = list(facts.corpus.values())
    long, query = " ".join(passages[:6]), next(iter(facts.queries.values()))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (pair,) = PairTokenizer(tokenizer, Template(), max_length=160, overflow="chunk").encode([(query, long)])
    assert len(pair.sequences) > 2
    model = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32).eval()
    best = max(plain_logits(model, list(pair.sequences)))
    with LocalReranker(str(tiny), device="cpu", dtype="float32", max_length=160, overflow="chunk") as reranker:
        assert reranker.score_pairs([(query, long)])[0].logit == pytest.approx(best, abs=TOLERANCE)


def test_bfloat16_stays_near_float32(tiny, pairs, expected):
    with LocalReranker(str(tiny), device="cpu", dtype="bfloat16") as reranker:
        found = logits(reranker.score_pairs(pairs))
    scale = max(abs(value) for value in expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.1 * max(1.0, scale)
