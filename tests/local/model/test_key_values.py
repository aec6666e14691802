"""Sequences in chunks: the logits of whole sequences, and no more kept keys than later tokens reach."""

import copy

import pytest
import torch
from support import tiny_config
from transformers import LlamaConfig, LlamaForSequenceClassification, MistralForSequenceClassification

from mistral_rerank import CheckpointError
from mistral_rerank.local.model.pooling import PoolingConfig
from mistral_rerank.local.model.rerank_model import RerankModel

CPU = torch.device("cpu")
BEFORE = {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [2.0 + 0.8 * i for i in range(8)]}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 1.7, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **BEFORE},
    "longrope": {"rope_type": "longrope", "factor": 4.0, **FACTORS, **BEFORE},
}
LENGTHS = (1, 7, 8, 23, 24, 25, 64, 65, 150)


def model_of(**changes):
    torch.manual_seed(0)
    return MistralForSequenceClassification(tiny_config(100, **changes)).eval()


def reranker_of(model, dtype=torch.float32, **options):
    model = copy.deepcopy(model).to(dtype)
    return RerankModel(model.base_model, model.score, CPU, **options)


def sequence(length):
    return [(7 * n + length) % 90 + 3 for n in range(length)]


def whole_and_chunked(reranker, ids, tokens):
    (batch,) = reranker.plan([ids], 10**9)
    *earlier, logit = reranker.chunks(ids, tokens)
    assert earlier == [None] * len(earlier)
    return reranker.logits(batch)[0], logit


@pytest.mark.parametrize("window", [None, 24, 5, 1])
@pytest.mark.parametrize("tokens", [8, 16, 40])
def test_chunks_have_the_logit_of_the_whole_sequence(window, tokens):
    reranker = reranker_of(model_of(sliding_window=window))
    for length in LENGTHS:
        whole, chunked = whole_and_chunked(reranker, sequence(length), tokens)
        assert chunked == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("kind", ROPES)
def test_chunks_have_the_rotary_frequencies_of_the_whole_sequence(kind):
    torch.manual_seed(0)
    config = tiny_config(100, head_dim=16, max_position_embeddings=64 if kind == "dynamic" else 256).to_dict()
    config = {name: value for name, value in config.items() if name not in ("model_type", "rope_parameters")}
    model = LlamaForSequenceClassification(LlamaConfig(**config, rope_parameters=ROPES[kind])).eval()
    reranker = reranker_of(model)
    for length in (64, 65, 150):
        whole, chunked = whole_and_chunked(reranker, sequence(length), 16)
        assert chunked == pytest.approx(whole, abs=1e-5)


def test_chunks_in_bfloat16_have_the_logit_of_the_whole_sequence_up_to_rounding():
    reranker = reranker_of(model_of(), torch.bfloat16)
    whole, chunked = whole_and_chunked(reranker, sequence(150), 16)
    assert chunked == pytest.approx(whole, abs=0.1)


def test_other_sequences_may_run_between_chunks():
    reranker = reranker_of(model_of())
    (other,) = reranker.plan([sequence(30)], 10**9)
    alone, expected = reranker.logits(other), list(reranker.chunks(sequence(150), 16))
    steps = []
    for logit in reranker.chunks(sequence(150), 16):
        steps.append(logit)
        assert reranker.logits(other) == alone
    assert steps == expected


def test_later_chunks_are_shorter_because_they_attend_to_more_keys():
    backbone = reranker_of(model_of())._packed
    assert backbone.chunk_length(0, 64) == 64
    assert 8 <= backbone.chunk_length(500, 64) < 64


@pytest.mark.parametrize(("window", "kept_tokens"), [(None, 150), (24, 23)])
def test_keys_that_no_later_token_reaches_are_freed(window, kept_tokens):
    reranker = reranker_of(model_of(sliding_window=window))
    ids, backbone = sequence(150), reranker._packed
    kept = backbone.begin(150)
    for start in range(0, 150, 40):
        backbone.extend(kept, ids[start : start + 40])
    assert kept.tokens == 150
    for key, value in kept._kept:
        assert key.shape == value.shape == (1, 1, kept_tokens, 16)
    assert reranker.key_value_bytes == 2 * 3 * 16 * 4


@pytest.mark.parametrize("pooling", [PoolingConfig(bidirectional=True), PoolingConfig(mean=True)])
def test_bidirectional_attention_and_mean_pooling_compute_sequences_whole(pooling):
    assert reranker_of(model_of(), pooling=pooling).key_value_bytes == 0


def test_padded_rows_compute_sequences_whole():
    reranker = reranker_of(model_of(), packed=False)
    assert reranker.key_value_bytes == 0
    with pytest.raises(CheckpointError, match="whole"):
        next(reranker.chunks(sequence(30), 8))
