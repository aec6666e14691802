"""Rotary frequencies: those of transformers for each sequence alone, in every dtype, whatever shares its batch."""

import copy
from functools import cache

import pytest
import torch
from support import model_logits, plain_logits, tiny_config
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from mistral_rerank.local.checkpoints.loading import load_model, open_checkpoint
from mistral_rerank.local.model.rerank_model import RerankModel
from mistral_rerank.local.model.rotary import same_frequencies

CPU = torch.device("cpu")
HALF_HEAD = 8
SHORT = [1.0 + 0.05 * place for place in range(HALF_HEAD)]
LONG = [2.0 + 0.8 * place for place in range(HALF_HEAD)]


def ropes(trained):
    """Every scaling of a model that was trained on so many positions."""
    before = {"original_max_position_embeddings": trained, "rope_theta": 10000.0}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "default": {"rope_type": "default", "rope_theta": 10000.0},
        "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        "dynamic": {"rope_type": "dynamic", "factor": 1.7, "rope_theta": 10000.0},
        "llama3": {"rope_type": "llama3", "factor": 4.0, **before, **llama3},
        "yarn": {"rope_type": "yarn", "factor": 4.0, **before},
        "yarn with mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3, **before},
        "yarn with a factor of its own": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **before},
        "longrope": {"rope_type": "longrope", "factor": 4.0, "short_factor": SHORT, "long_factor": LONG, **before},
    }


KINDS = list(ropes(64))
LENGTHS = (30, 64, 65, 40, 100, 65, 150, 90, 5)
QUESTION = [n % 90 + 3 for n in range(28)]
SEQUENCES = [
    QUESTION[:length] + [(7 * n + length) % 90 + 3 for n in range(length - len(QUESTION))] for length in LENGTHS
]


def made(kind, trained=64, *, architecture=MistralForSequenceClassification, **changes):
    torch.manual_seed(0)
    longest = trained if kind == "dynamic" else trained * 4
    options = {
        "sliding_window": None,
        "head_dim": 2 * HALF_HEAD,
        "max_position_embeddings": longest,
        "rope_parameters": ropes(trained)[kind],
    }
    config = tiny_config(100, **options | changes)
    if architecture is LlamaForSequenceClassification:
        config = LlamaConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})
    return architecture(config).eval()


def alone(model, sequences):
    """The reference: each sequence in a model that has read nothing before."""
    return [logit for ids in sequences for logit in plain_logits(copy.deepcopy(model), [ids])]


def ours(model, **options):
    taken = copy.deepcopy(model)
    return RerankModel(taken.base_model, taken.score, CPU, **options)


LONG_SEQUENCES = [[(11 * n + length) % 90 + 3 for n in range(length)] for length in (8192, 2500, 2048, 300)]


@cache
def long_model(kind):
    """A model for positions up to 8,192, and the reference for `LONG_SEQUENCES`."""
    model = made(kind, trained=2048, num_attention_heads=2, num_hidden_layers=2, initializer_range=0.1)
    return model, alone(model, LONG_SEQUENCES)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_keep_their_own_frequencies_beside_shorter_and_longer_ones(kind, packed):
    model = made(kind, architecture=LlamaForSequenceClassification)
    expected = alone(model, SEQUENCES)
    reranker = ours(model, packed=packed)
    assert model_logits(reranker, SEQUENCES) == pytest.approx(expected, abs=1e-4)
    assert model_logits(reranker, SEQUENCES[::-1])[::-1] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_up_to_position_8192_are_those_of_transformers(kind, packed):
    model, expected = long_model(kind)
    assert model_logits(ours(model, packed=packed), LONG_SEQUENCES) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_a_cascade_goes_on_with_the_same_frequencies(kind):
    model = made(kind)
    reranker = ours(model, resumable=True)
    expected = alone(model, SEQUENCES)
    for batch in reranker.plan(SEQUENCES, 10**9):
        logits = reranker.logits(batch, reranker.states(batch, 2))
        assert logits == pytest.approx([expected[member] for member in batch.members], abs=1e-4)


OTHERS = {
    "a part of each head, longrope": lambda shape: Phi3ForSequenceClassification(
        Phi3Config(
            **shape,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": SHORT[:4],
                "long_factor": LONG[:4],
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "dynamic": lambda shape: Qwen2ForSequenceClassification(
        Qwen2Config(**shape, max_position_embeddings=64, rope_parameters=ropes(64)["dynamic"])
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_keep_each_sequences_frequencies_too(name):
    torch.manual_seed(0)
    tiny = tiny_config(100).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = OTHERS[name](
        {key: tiny[key] for key in names}
        | {"num_key_value_heads": 1, "initializer_range": 0.2, "num_labels": 1, "pad_token_id": 0}
    ).eval()
    expected = alone(model, SEQUENCES)
    reranker = ours(model)
    assert model_logits(reranker, SEQUENCES) == pytest.approx(expected, abs=1e-4)
    assert model_logits(reranker, SEQUENCES[::-1])[::-1] == pytest.approx(expected, abs=1e-4)


def test_sequences_are_grouped_by_what_their_frequencies_depend_on():
    lengths = [10, 64, 65, 70, 65, 5]
    assert same_frequencies(made("yarn").config, lengths) == {(): [0, 1, 2, 3, 4, 5]}
    assert same_frequencies(made("longrope").config, lengths) == {(0,): [0, 1, 5], (1,): [2, 3, 4]}
    assert same_frequencies(made("dynamic").config, lengths) == {(0,): [0, 1, 5], (65,): [2, 4], (70,): [3]}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tokenizer):
    """A whole model, and an adapter on it, both with positions up to 8,192."""
    from peft import LoraConfig, get_peft_model

    whole, adapter = (tmp_path_factory.mktemp(name) for name in ("whole", "adapter"))
    torch.manual_seed(0)
    model = MistralForSequenceClassification(
        tiny_config(len(tokenizer), max_position_embeddings=8192, sliding_window=None, initializer_range=0.1)
    )
    model.save_pretrained(whole)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(whole)
    adapted.save_pretrained(adapter)
    for folder in (whole, adapter):
        tokenizer.save_pretrained(folder)
        (folder / "rerank.json").write_text("{}")
    return {"whole": whole, "adapter": adapter}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_angles_are_not_rounded_with_the_weights(checkpoints, kind, dtype):
    base = str(checkpoints["whole"]) if kind == "adapter" else None
    loaded = load_model(open_checkpoint(str(checkpoints[kind]), base=base), dtype=dtype)
    assert {weight.dtype for weight in loaded.base_model.parameters()} == {dtype}
    theirs = AutoModelForSequenceClassification.from_pretrained(checkpoints["whole"], dtype=dtype)
    states, positions = torch.zeros(1, 8192, 64, dtype=dtype), torch.arange(8192)[None]
    for found, expected in zip(
        loaded.base_model.rotary_emb(states, positions), theirs.base_model.rotary_emb(states, positions), strict=True
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_long_inputs_lose_no_more_in_bfloat16_than_in_transformers(checkpoints):
    folder = checkpoints["whole"]
    exact, theirs = (
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    sequences = [[(7 * n + 13 * start) % 400 + 3 for n in range(900)] for start in range(8)]
    loaded = load_model(open_checkpoint(str(folder)), dtype=torch.bfloat16)
    found = model_logits(RerankModel(loaded.base_model, loaded.score, CPU), sequences)
    expected = torch.tensor(plain_logits(exact, sequences))
    error, usual = (
        (torch.tensor(logits) - expected).square().mean().sqrt() for logits in (found, plain_logits(theirs, sequences))
    )
    assert error < 1.2 * usual
