"""The forward that is trained: rows without padding through transformers' own modules."""

import copy
from unittest.mock import Mock

import pytest
import torch
from support import plain_logits, tiny_config
from transformers import MistralForSequenceClassification, TrainerState

from mistral_rerank.local.batching.packing import pack
from mistral_rerank.local.batching.planning import plan_packed
from mistral_rerank.local.model import attention
from mistral_rerank.local.model.attention import PACKED_ATTENTION, register
from mistral_rerank.local.model.pooling import LAST_TOKEN
from mistral_rerank.training.trainer import LossProgress, group_logits

QUESTION = list(range(10, 22))
SEQUENCES = [[*QUESTION, *range(30, 30 + rest)] for rest in (1, 5, 20)] + [[7, 8, 9], [5, 6, 4]]


@pytest.fixture(scope="module", params=[None, 24], ids=["full", "window"])
def classifiers(request):
    """The same weights twice: for the reference, and for packed rows."""
    register()
    torch.manual_seed(0)
    reference = MistralForSequenceClassification(tiny_config(100, sliding_window=request.param)).eval()
    packed = copy.deepcopy(reference)
    packed.base_model.set_attn_implementation(PACKED_ATTENTION)
    return reference, packed


def logits(classifier):
    row = pack(*plan_packed(SEQUENCES, 10**9))
    return group_logits(classifier, LAST_TOKEN, packs=[row], positions=torch.tensor(row.members).argsort())


@pytest.mark.parametrize("plain_scores", [0, attention.PLAIN_SCORES], ids=["fused", "plain"])
def test_logits_and_gradients_equal_those_of_single_sequences(classifiers, monkeypatch, plain_scores):
    monkeypatch.setattr(attention, "PLAIN_SCORES", plain_scores)
    plainly = Mock(wraps=attention._attend_plainly)
    monkeypatch.setattr(attention, "_attend_plainly", plainly)
    reference, packed = classifiers
    packed_logits = logits(packed)
    assert plainly.called == bool(plain_scores)
    assert packed_logits.tolist() == pytest.approx(plain_logits(reference, SEQUENCES), abs=1e-4)
    packed_logits.square().sum().backward()
    sum(reference(input_ids=torch.tensor([ids]), use_cache=False).logits.square().sum() for ids in SEQUENCES).backward()
    for (name, weight), other in zip(reference.named_parameters(), packed.parameters(), strict=True):
        assert torch.allclose(weight.grad, other.grad, rtol=1e-3, atol=1e-4), name
    reference.zero_grad()
    packed.zero_grad()


def test_plain_attention_in_bfloat16_is_close_to_the_fused_one(monkeypatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 30, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    results = {}
    for plain_scores in (0, attention.PLAIN_SCORES):
        monkeypatch.setattr(attention, "PLAIN_SCORES", plain_scores)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = attention.attend(query, key, value, None, None, is_causal=True)
        results[plain_scores] = [mixed, *torch.autograd.grad(mixed.float().square().sum(), (query, key, value))]
    for plain, fused in zip(*results.values(), strict=True):
        assert plain.dtype == fused.dtype == torch.bfloat16
        assert (plain - fused).abs().max() < 0.03 * fused.abs().max()


def test_a_resumed_run_says_all_tokens_and_the_time_left_at_its_speed():
    state, lines = TrainerState(global_step=10, max_steps=40, num_input_tokens_seen=10_000), []
    progress = LossProgress(lines.append)
    progress.on_train_begin(None, TrainerState(global_step=4, max_steps=40), None)
    progress.training_bar.disable = True
    progress.on_log(None, state, None, {"loss": 1.0, "train_runtime": 720.0, "train_tokens_per_second": 5.833})
    progress.on_log(None, state, None, {"eval_ndcg@10": 0.5})
    assert lines == ["step 10 of 40, loss 1.000, 10,000 tokens, 6 a second, 1 h 00 min left"]
