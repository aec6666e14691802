"""transformers and PEFT are the reference: a plain checkpoint is read to the same bits, and any other is left to them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from mistral_rerank import LocalReranker
from mistral_rerank.local.checkpoints.config import CheckpointConfig
from mistral_rerank.local.checkpoints.loading import Checkpoint, load_model, load_tokenizer, open_checkpoint
from mistral_rerank.local.checkpoints.plain import read_plain_model, read_plain_tokenizer
from mistral_rerank.local.checkpoints.trust import read_json
from mistral_rerank.local.engine.tokenizer import PairTokenizer
from mistral_rerank.local.model.rerank_model import RerankModel


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def change(file, **values):
    content = read_json(file) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), "utf-8")


def write_adapter(base, folder, **options):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options)).save_pretrained(folder)
    return Checkpoint(folder, CheckpointConfig(), base)


def assert_equal(checkpoint, dtype):
    plain, reference = read_plain_model(checkpoint, dtype), load_model(checkpoint, dtype=dtype)
    assert plain is not None
    weights, expected = plain.base_model.state_dict(), reference.base_model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert torch.equal(plain.score.weight, reference.score.weight)
    positions = torch.tensor([[0, 1, 2, 777, 8191]])
    states = weights["norm.weight"]
    rotary, expected_rotary = (model.base_model.rotary_emb(states, positions) for model in (plain, reference))
    assert all(torch.equal(*pair) for pair in zip(rotary, expected_rotary, strict=True))
    device = torch.device("cpu")
    models = [RerankModel(model.base_model, model.score, device) for model in (plain, reference)]
    logits = []
    for model in models:
        batches = model.plan([[5, 6, 7, 8, 9, 10], [5, 6, 9, 11]], 1024)
        logits.append([model.logits(batch) for batch in batches])
    assert logits[0] == logits[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mini_is_read_to_the_last_bit(dtype):
    assert_equal(open_checkpoint("mini"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_model_is_read_to_the_last_bit(folder, dtype):
    (folder / "rerank.json").write_text('{"temperature": 3.0}', "utf-8")
    assert_equal(open_checkpoint(str(folder)), dtype)


def test_an_adapter_is_read_to_the_last_bit(tiny, tmp_path):
    assert_equal(write_adapter(tiny, tmp_path, lora_alpha=5), torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear", "bias": "lora_only"},
        {"target_modules": ["q_proj"], "modules_to_save": ["score", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_an_adapter_with_anything_else_is_left_to_peft(tiny, tmp_path, options):
    assert read_plain_model(write_adapter(tiny, tmp_path, **options), torch.float32) is None


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"hidden_act": "gelu"},
        {"model_type": "qwen2"},
        {"quantization_config": {}},
        {"new_key": 1},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 4},
        {"hidden_size": 32},
        {"sliding_window": ...},
        {"dtype": "bfloat16"},
    ],
)
def test_a_config_with_anything_else_is_left_to_transformers(folder, values):
    assert read_plain_model(open_checkpoint(str(folder)), torch.float32) is not None
    change(folder / "config.json", **values)
    assert read_plain_model(open_checkpoint(str(folder)), torch.float32) is None


@pytest.mark.parametrize("model", ["mini", "tiny"])
def test_a_tokenizer_gives_the_same_ids(model, tiny, pairs):
    checkpoint = open_checkpoint("mini" if model == "mini" else str(tiny))
    plain, reference = read_plain_tokenizer(checkpoint), load_tokenizer(checkpoint)
    assert plain is not None
    assert plain.eos_token_id == reference.eos_token_id
    assert "token_type_ids" not in reference.model_input_names
    added = [tokenizer.backend_tokenizer.get_added_tokens_decoder() for tokenizer in (plain, reference)]
    assert repr(added[0]) == repr(added[1])
    texts = [*pairs, ("<|im_end|> 2024\u00e9", "</s><s> \U0001f600 12345")]
    encoded = [
        PairTokenizer(tokenizer, checkpoint.config.prompt, max_length=200).encode(texts, "chunk", locate=True)
        for tokenizer in (plain, reference)
    ]
    assert encoded[0] == encoded[1]


@pytest.mark.parametrize(
    "values",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"add_bos_token": True},
        {"eos_token": "<new>"},
        {"extra_special_tokens": ["<new>"]},
        {"vocab_file": "vocab.txt"},
    ],
)
def test_a_tokenizer_that_transformers_would_change_is_left_to_it(folder, values):
    change(folder / "tokenizer_config.json", **values)
    assert read_plain_tokenizer(open_checkpoint(str(folder))) is None


def test_scores_are_those_of_transformers_path_to_the_last_bit(tiny, pairs, monkeypatch):
    options = {"device": "cpu", "dtype": "float32"}
    with LocalReranker(str(tiny), **options) as reranker:
        scores = reranker.score_pairs(pairs)
    monkeypatch.setattr("mistral_rerank.local.scorer.read_plain_model", lambda *_: None)
    monkeypatch.setattr("mistral_rerank.local.scorer.read_plain_tokenizer", lambda *_: None)
    with LocalReranker(str(tiny), **options) as reranker:
        assert scores == reranker.score_pairs(pairs)
