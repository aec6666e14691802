"""Our forward of Mistral and Llama: transformers' own scores, whatever their configuration leaves open."""

import copy
import weakref
from typing import get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from support import model_logits, plain_logits, tiny_config
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralForSequenceClassification,
    StableLmConfig,
)
from transformers import StableLmForSequenceClassification as StableLm

from mistral_rerank import CheckpointError
from mistral_rerank.local.model.quantization import multiplies_bytes
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.local.model.transformer import is_known
from mistral_rerank.reranker import Quantization

here = pytest.mark.skipif(not multiplies_bytes(), reason="this CPU has no VNNI instructions")
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
    "window that a Llama ignores": lambda: llama(sliding_window=24),
    "scaled positions": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "scaled attention": lambda: llama(
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        }
    ),
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
    assert model_logits(ours, SEQUENCES) == pytest.approx(expected, abs=1e-4)
    assert model_logits(ours, SEQUENCES[::-1])[::-1] == pytest.approx(expected, abs=1e-4), (
        "nothing is left of the last row"
    )


def errors(model, *others):
    """Root mean squares over many sequences: of the logits, then of how far each of the other models is from them."""
    sequences = [[(7 * n + start) % 90 + 3 for n in range(5 + 11 * start % 70)] for start in range(40)]
    expected = torch.tensor(plain_logits(model, sequences))
    found = (
        model_logits(other, sequences) if isinstance(other, RerankModel) else plain_logits(other, sequences)
        for other in others
    )
    return [
        expected.std().item(),
        *((torch.tensor(logits) - expected).square().mean().sqrt().item() for logits in found),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_costs_no_more_than_in_transformers(name):
    model = made(name)
    _, ours, usual = errors(model, packed(model, torch.bfloat16), copy.deepcopy(model).to(torch.bfloat16))
    assert ours < 1.5 * usual


@pytest.mark.parametrize("quantization", [None, pytest.param("int8", marks=here), "nf4"])
def test_weights_are_not_held_twice(quantization):
    model = made("window")
    held = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.base_model.layers]
    ours = RerankModel(model.base_model, model.score, torch.device("cpu"), quantization=quantization)
    assert not any(weight() for weight in held)
    assert len(model_logits(ours, SEQUENCES)) == len(SEQUENCES)


def test_what_has_no_layers_is_not_known():
    assert not is_known(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))


def test_another_architecture_runs_in_its_own_way_and_not_in_fewer_bits():
    torch.manual_seed(0)
    model = StableLm(StableLmConfig(**SHAPE | {"initializer_range": 0.2})).eval()
    assert not is_known(model.base_model)
    assert model_logits(packed(model), SEQUENCES) == pytest.approx(plain_logits(model, SEQUENCES), abs=1e-4)
    for quantization in get_args(Quantization):
        with pytest.raises(CheckpointError, match="leave it out"):
            packed(model, quantization=quantization)


@here
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_in_8_bits_are_near(name, dtype):
    model = made(name)
    spread, error = errors(model, packed(model, dtype, quantization="int8"))
    assert 0.02 * spread < error < 0.2 * spread


@pytest.mark.parametrize("name", MODELS)
def test_scores_in_4_bits_are_those_of_the_rounded_weights(name):
    model = made(name)
    ours = packed(model, quantization="nf4")
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            rounded = quantize_4bit(module.weight.detach(), quant_type="nf4", compress_statistics=True)
            module.weight.data = dequantize_4bit(*rounded)
    assert model_logits(ours, SEQUENCES) == pytest.approx(plain_logits(model, SEQUENCES), abs=1e-4)


def test_a_rounded_model_lets_go_of_the_memory_that_its_weights_were_read_into():
    model = made("window")
    read_into = [parameter.detach() for parameter in model.base_model.parameters()]  # held, so no address comes again
    RerankModel(model.base_model, model.score, torch.device("cpu"), quantization="nf4")
    left = list(model.base_model.parameters())
    assert len(left) == 2, "the embeddings and the last norm"
    assert {old.data_ptr() for old in read_into}.isdisjoint(new.data_ptr() for new in left)
