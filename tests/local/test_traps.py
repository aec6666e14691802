"""Ways in which rerankers built on causal language models go wrong without an error, one test each."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import plain_logits, tiny_config
from torch import nn
from transformers import AutoModelForSequenceClassification, MistralForSequenceClassification, MistralModel

from mistral_rerank import CheckpointError, LocalReranker, ScoringError
from mistral_rerank.local.checkpoints.config import CheckpointConfig
from mistral_rerank.local.checkpoints.loading import Checkpoint, load_model, open_checkpoint
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.pooling import pooled_logits
from mistral_rerank.local.model.rerank_model import pad
from mistral_rerank.templates import Template

PAIRS = [("who?", "me"), ("where is the river?", "In the valley, under the old glacier, far from the sea.")]


def sequences(tokenizer, pairs=PAIRS):
    return [pair.sequences[0] for pair in PairTokenizer(tokenizer, Template(), max_length=512).encode(pairs)]


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(3)
    return MistralForSequenceClassification(tiny_config(len(tokenizer))).eval()


def batched(model, ids):
    with torch.inference_mode():
        return pooled_logits(model.model, model.score, *pad(ids)).tolist()


def test_trap_1_the_end_token_is_pooled_even_when_it_is_also_the_pad_token(model, tokenizer):
    ids = sequences(tokenizer)
    expected = batched(model, ids)
    model.config.pad_token_id = tokenizer.eos_token_id
    assert plain_logits(model, ids)[0] != pytest.approx(expected[0], abs=1e-3), "transformers falls into the trap"
    assert batched(model, ids) == expected


def test_trap_2_the_pad_id_of_the_config_does_not_matter(model, tokenizer):
    ids = sequences(tokenizer)
    expected = plain_logits(model, ids)
    for pad_token_id in (None, ids[0][-2]):
        model.config.pad_token_id = pad_token_id
        assert batched(model, ids) == pytest.approx(expected, abs=1e-4)


def test_trap_3_no_cache_is_built_even_if_the_config_asks_for_one(model, tokenizer, monkeypatch):
    model.config.use_cache = True
    seen = []
    forward = MistralModel.forward
    monkeypatch.setattr(MistralModel, "forward", lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1])
    batched(model, sequences(tokenizer))
    assert [output.past_key_values for output in seen] == [None]


def test_trap_4_the_sliding_window_is_respected(model, tokenizer):
    ids = sequences(tokenizer, [("where is the river?", "In the valley under the old glacier. " * 8)])
    assert len(ids[0]) > 3 * model.config.sliding_window
    with_window = plain_logits(model, ids)
    assert batched(model, [*ids, *sequences(tokenizer)])[0] == pytest.approx(with_window[0], abs=1e-4)
    buffer = MistralForSequenceClassification(tiny_config(len(tokenizer), sliding_window=None)).eval()
    buffer.load_state_dict(model.state_dict())
    assert batched(buffer, ids)[0] != pytest.approx(with_window[0], abs=1e-3)


def test_trap_5_attention_that_cannot_be_run_is_refused_not_run_causally(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "prefix-first")
    (folder / "rerank.json").write_text(json.dumps({"attention": "prefix"}))  # "bidirectional": test_reading.py
    with pytest.raises(CheckpointError, match="attention"):
        open_checkpoint(str(folder))


def test_trap_6_a_pair_is_one_text_with_one_start_token(tokenizer):
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in sequences(tokenizer))


def test_trap_7_question_and_passage_are_tokenized_together(tokenizer):
    template = "{query}{passage}"
    maker = PairTokenizer(tokenizer, Template(template), max_length=512)
    ((ids,),) = [pair.sequences for pair in maker.encode([("the gla", "cier")])]
    assert ids == [*tokenizer("the glacier").input_ids, tokenizer.eos_token_id]
    apart = tokenizer("the gla").input_ids + tokenizer("cier", add_special_tokens=False).input_ids
    assert ids[:-1] != apart, "the pieces tokenized apart differ, so this test can fail"


def test_trap_8_truncation_keeps_the_question_and_the_end_token(tokenizer):
    maker = PairTokenizer(tokenizer, Template(), max_length=40)
    ((ids,),) = [pair.sequences for pair in maker.encode([("where is it?", "far away " * 100)])]
    assert (len(ids), ids[-1]) == (40, tokenizer.eos_token_id)
    assert tokenizer.decode(ids).startswith("<s>question:where is it?")


def test_trap_9_the_head_runs_in_float32_so_bfloat16_hidden_states_do_not_tie():
    class Backbone(nn.Module):
        def forward(self, input_ids, **_):
            hidden = torch.tensor([[[100.0, 1.0]], [[100.0, 1.0078125]]], dtype=torch.bfloat16)
            return type("Output", (), {"last_hidden_state": hidden})

    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.ones(1, 2)
    logits = pooled_logits(Backbone(), head, torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 1]))
    assert logits.dtype == torch.float32
    assert logits.tolist() == [101.0, 101.0078125]
    assert len(set(logits.bfloat16().tolist())) == 1, "in bfloat16 they would tie"


def test_trap_11_an_adapter_is_merged_in_float32_and_then_cast(tiny, tokenizer, tmp_path):
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(tmp_path)
    exact = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    checkpoint = Checkpoint(tmp_path, CheckpointConfig(), tiny)
    merged = load_model(checkpoint, dtype=torch.bfloat16).model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())
    whole = load_model(checkpoint, dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(whole, exact)


def test_trap_9_a_trained_head_is_not_rounded_with_the_backbone(tiny, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"]))
    nn.init.normal_(adapted.get_base_model().score.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path / "adapter")
    trained = adapted.get_base_model().score.modules_to_save["default"].weight
    AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint(tmp_path / "adapter", CheckpointConfig(), tmp_path / "base")
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(checkpoint, dtype=dtype)
        assert model.model.norm.weight.dtype == dtype
        assert torch.equal(model.score.weight, trained)


def test_trap_13_only_running_out_of_memory_is_retried(tiny_reranker, tiny, monkeypatch):
    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("mistral_rerank.local.model.transformer.PackedBackbone.__call__", fail)
    with LocalReranker(str(tiny), device="cpu") as reranker, pytest.raises(RuntimeError, match="mat1"):
        reranker.score_pairs(PAIRS)
    assert len(calls) == 1


def test_trap_14_a_logit_that_is_not_a_number_is_an_error(tiny, monkeypatch):
    nan = torch.tensor([float("nan"), 1.0])
    monkeypatch.setattr("mistral_rerank.local.model.rerank_model.apply_head", lambda *_: nan)
    with LocalReranker(str(tiny), device="cpu") as reranker, pytest.raises(ScoringError, match="nan"):
        reranker.score_pairs(PAIRS)


def test_trap_14_an_empty_passage_has_a_score(tiny_reranker):
    ranking = tiny_reranker.rank("who?", ["", "me", ""])
    assert sorted(place.index for place in ranking) == [0, 1, 2]
    empty = [place for place in ranking if place.text == ""]
    assert [place.index for place in empty] == [0, 2]
