"""Our forward of Mistral and Llama: transformers' own scores, whatever their configuration leaves open."""

import copy

import pytest
import torch
from support import plain_logits, tiny_config
from transformers import LlamaConfig, LlamaForSequenceClassification, MistralForSequenceClassification, Qwen2Config
from transformers import Qwen2ForSequenceClassification as Qwen2

from mistral_rerank import CheckpointError
from mistral_rerank.local.backbone import is_known
from mistral_rerank.local.int8 import multiplies_bytes
from mistral_rerank.local.model import RerankModel

SEQUENCES = [[n % 90 + 3 for n in range(start, start + length)] for start, length in enumerate((5, 40, 40, 3, 80))]
TINY = tiny_config(100).to_dict()
SHAPE = {name: TINY[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 0}


def llama(**changes):
    return LlamaForSequenceClassification(LlamaConfig(**SHAPE | {"initializer_range": 0.2} | changes))


MODELS = {
    "window": lambda: MistralForSequenceClassification(tiny_config(100)),
    "wide heads": lambda: MistralForSequenceClassification(tiny_config(100, head_dim=32)),
    "gelu": lambda: MistralForSequenceClassification(tiny_config(100, hidden_act="gelu")),
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "scaled positions": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for weight_name, weight in model.named_parameters():
        if weight_name.endswith("bias") or "norm" in weight_name:
            torch.nn.init.normal_(weight, 0.5)
    return model


def packed(model, dtype=torch.float32, **options):
    ours = copy.deepcopy(model).to(dtype)
    return RerankModel(ours.base_model, ours.score, torch.device("cpu"), **options)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_transformers(name):
    model = made(name)
    expected = plain_logits(model, SEQUENCES)
    ours = packed(model)
    assert ours.logits(SEQUENCES) == pytest.approx(expected, abs=1e-4)
    assert ours.logits(SEQUENCES[::-1])[::-1] == pytest.approx(expected, abs=1e-4), "nothing is left of the last row"


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_bfloat16_are_near(name):
    model = made(name)
    expected = plain_logits(model, SEQUENCES)
    found = packed(model, torch.bfloat16).logits(SEQUENCES)
    rounded = plain_logits(copy.deepcopy(model).to(torch.bfloat16), SEQUENCES)
    error, usual = (max(abs(a - b) for a, b in zip(expected, other, strict=True)) for other in (found, rounded))
    assert error <= 1.5 * usual + 2e-2 * max(1.0, *map(abs, expected))


def test_weights_are_not_held_twice():
    model = made("window")
    layers = model.base_model.layers
    RerankModel(model.base_model, model.score, torch.device("cpu"))
    assert len(layers) == 0


def test_another_architecture_runs_in_its_own_way_and_not_in_8_bits():
    torch.manual_seed(0)
    model = Qwen2(Qwen2Config(**SHAPE | {"initializer_range": 0.2})).eval()
    assert not is_known(model.base_model)
    assert packed(model).logits(SEQUENCES) == pytest.approx(plain_logits(model, SEQUENCES), abs=1e-4)
    with pytest.raises(CheckpointError, match="Mistral and Llama"):
        packed(model, quantization="int8")


@pytest.mark.skipif(not multiplies_bytes(), reason="this CPU has no VNNI instructions")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_8_bits_are_near(name, dtype):
    model = made(name)
    expected = plain_logits(model, SEQUENCES)
    found = packed(model, dtype, quantization="int8").logits(SEQUENCES)
    spread = max(expected) - min(expected)
    assert 0 < max(abs(a - b) for a, b in zip(expected, found, strict=True)) < 0.15 * spread
