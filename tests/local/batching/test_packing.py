"""Packed rows: the layout by value, and the scores against transformers' forward of each sequence alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_logits, plain_logits, tiny_config
from transformers import AutoModelForSequenceClassification, MistralForSequenceClassification

from mistral_rerank.local.batching import packing
from mistral_rerank.local.batching.packing import pack
from mistral_rerank.local.batching.planning import bucket_capacity, bucket_length, plan_packed
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.attention import span_masks
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.templates import Template

QUESTION = list(range(10, 22))


@pytest.fixture(scope="module", params=[None, 24], ids=["full", "window"])
def models(request):
    """The same weights twice: as transformers runs them, and in packed rows."""
    config = tiny_config(100, sliding_window=request.param)
    torch.manual_seed(0)
    reference = MistralForSequenceClassification(config).eval()
    ours = copy.deepcopy(reference)
    return reference, RerankModel(ours.base_model, ours.score, torch.device("cpu"))


def test_a_row_has_no_padding_and_each_prefix_once():
    sequences = [[*QUESTION, 1], [5, 6, 7], [*QUESTION, 2, 3]]
    packed = pack(*plan_packed(sequences, 10**9))
    assert packed.ids.tolist() == [[5, 6, 7, *QUESTION, 1, 2, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, *range(12), 12, 12, 13]]
    assert packed.members == (1, 0, 2)
    assert packed.last.tolist() == [2, 15, 17]


def test_rows_are_padded_to_few_buckets():
    lengths = [bucket_length(tokens) for tokens in range(1, 4097)]
    assert all(0 <= length - tokens < max(8, tokens / 32) for tokens, length in enumerate(lengths, 1))
    assert sum(lengths) / sum(range(1, 4097)) < 1.02
    assert len(set(lengths)) < 180
    assert all(bucket_length(bucket_capacity(budget)) <= budget for budget in range(8, 4097))
    assert all(bucket_length(bucket_capacity(budget) + 1) > budget for budget in range(8, 4097))
    packed = pack(*plan_packed([[1, 2], [3, 4, 5]], 10**9))
    padded = packed.padded_to_bucket()
    assert padded.ids.tolist() == [[3, 4, 5, 1, 2, 0, 0, 0]]
    assert padded.spans == (*packed.spans, packing.Span(5, 8))
    assert padded.padded_to_bucket() is padded


def test_sequences_of_one_length_attend_in_one_call():
    sequences = [[1, 2], [3, 4, 5], [6, 7], [*QUESTION, 1], [*QUESTION, 2], [8, 9, 10], [11, 12]]
    packed = pack(*plan_packed(sequences, 10**9))
    assert packed.members == (1, 5, 0, 2, 6, 3, 4)
    assert packed.last.tolist() == [2, 5, 7, 9, 11, 24, 25]
    assert [(span.start, span.stop, span.sequences) for span in packed.spans] == [
        (0, 6, 2),
        (6, 12, 3),
        (12, 24, 1),
        (24, 26, 1),
    ]


def test_scores_of_sequences_of_one_length_equal_transformers_own(models):
    reference, ours = models
    sequences = [[i, *range(20, 20 + length), i] for i, length in enumerate([30, 30, 30, 5, 5, 60, 60], 1)]
    assert model_logits(ours, sequences) == pytest.approx(plain_logits(reference, sequences), abs=1e-4)


def test_a_mask_shows_the_prefix_and_what_came_before_of_the_same_sequence():
    sequences = [[*QUESTION, 1], [*QUESTION, 2, 3]]
    packed = pack(*plan_packed(sequences, 10**9))
    prefix, suffixes = span_masks(packed, window=4)
    places = torch.arange(12)
    assert torch.equal(prefix, (places <= places[:, None]) & (places > places[:, None] - 4))
    assert suffixes[:, :12].sum(1).tolist() == [3, 3, 2]
    assert suffixes[:, 12:].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_packed_scores_equal_transformers_own_one_at_a_time(models, data):
    reference, ours = models
    ids = st.lists(st.integers(1, 99), min_size=1, max_size=40)
    prefixes = data.draw(st.lists(ids, min_size=1, max_size=3))
    suffixes = data.draw(st.lists(st.tuples(st.sampled_from(prefixes), ids), min_size=1, max_size=12))
    sequences = [prefix + suffix for prefix, suffix in suffixes]
    found = model_logits(ours, sequences, data.draw(st.sampled_from([20, 100, 10_000])))
    assert found == pytest.approx(plain_logits(reference, sequences), abs=1e-4)


def test_a_model_scores_alike_with_and_without_padding(tiny, tokenizer, pairs):
    sequences = [pair.sequences[0] for pair in PairTokenizer(tokenizer, Template(), max_length=512).encode(pairs[:40])]
    found = []
    for packed in (True, False):
        loaded = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32)
        model = RerankModel(loaded.base_model, loaded.score, torch.device("cpu"), packed=packed)
        batches = model.plan(sequences, 600)
        assert sorted(i for batch in batches for i in batch.members) == list(range(40))
        assert all(batch.tokens <= 600 for batch in batches)
        found.append(model_logits(model, sequences, 600))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_suffixes_attend_in_calls_of_bounded_size(monkeypatch):
    monkeypatch.setattr(packing, "SPAN_TOKENS", 10)
    sequences = [[*QUESTION, *[i] * 4] for i in range(1, 6)]
    packed = pack(*plan_packed(sequences, 10**9))
    assert [span.suffixes for span in packed.spans] == [(), (4, 4), (4, 4), (4,)]
