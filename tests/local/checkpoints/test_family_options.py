"""Quantization and the cascade with every architecture of the known families."""

import shutil
from functools import cache

import families
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file

from mistral_rerank import CheckpointError, LocalReranker
from mistral_rerank.local.model.early_exit import EarlyExit, EarlyExitConfig, write_early_exit
from mistral_rerank.local.model.quantization import multiplies_bytes

QUERY = "Who wrote the novel?"
PASSAGES = [
    "She wrote it in 1871.",
    "Nobody knows who did, but it was read in every house of the town for years.",
    "The bridge opened later.",
    "yes",
    "It is a long way from the harbour to the hills, and the road is steep.",
]
PAIRS = [(QUERY, passage) for passage in PASSAGES]
OPTIONS = {"device": "cpu", "dtype": "float32"}
PACKED = [
    "Qwen3-Reranker",
    "Qwen3-Reranker with modules",
    "Qwen3-Reranker seq-cls",
    "zerank",
    "mxbai-rerank-v2",
    "ctxl-rerank-v2",
    "bge-reranker-v2-gemma",
    "llama-nemotron-rerank",
]
PADDED = ["ms-marco-MiniLM", "bge-reranker-v2-m3", "gte-modernbert", "ettin"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: families.FAMILIES[name](tmp_path_factory.mktemp("family")))


def logits(folder, **options):
    with LocalReranker(folder, **OPTIONS | options) as reranker:
        return [score.logit for score in reranker.score_pairs(PAIRS)]


def rounded_to_nf4(folder, tmp_path):
    """Copy a folder, with each linear of its layers rounded to NF4 and back."""
    rounded = shutil.copytree(folder, tmp_path / folder.name)
    weights = families.weights(rounded)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = dequantize_4bit(
                *quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
            )
    save_file(weights, rounded / "model.safetensors", metadata={"format": "pt"})
    return rounded


@pytest.mark.parametrize("name", PACKED)
def test_nf4_rounds_the_linears_of_the_layers_and_nothing_else(name, folders, tmp_path):
    """In these tiny random models the rounding moves scores by up to half of their spread."""
    folder = folders(name)
    exact, near = logits(folder), logits(folder, quantization="nf4")
    assert near == pytest.approx(logits(rounded_to_nf4(folder, tmp_path)), abs=1e-4)
    assert 0 < max(abs(one - other) for one, other in zip(exact, near, strict=True)) < 0.5 * (max(exact) - min(exact))


@pytest.mark.skipif(not multiplies_bytes(), reason="this CPU has no VNNI instructions")
@pytest.mark.parametrize("name", PACKED)
def test_int8_moves_scores_by_a_tenth_of_their_spread_at_most(name, folders):
    exact, near = logits(folders(name)), logits(folders(name), quantization="int8")
    assert 0 < max(abs(one - other) for one, other in zip(exact, near, strict=True)) < 0.1 * (max(exact) - min(exact))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("name", PACKED)
def test_the_second_pass_of_a_cascade_gives_the_scores_of_the_model(name, quantization, folders, tmp_path):
    folder = shutil.copytree(folders(name), tmp_path / folders(name).name)
    torch.manual_seed(0)
    early_exit = EarlyExit(32)
    torch.nn.init.normal_(early_exit.around.weight)
    write_early_exit(early_exit, EarlyExitConfig(layer=1), folder)
    exact = logits(folder, quantization=quantization)
    scores = logits(folder, quantization=quantization, cascade_depth=2)
    best = sorted(range(len(PAIRS)), key=lambda position: -scores[position])[:2]
    assert [scores[position] for position in best] == pytest.approx([exact[position] for position in best], abs=1e-4)
    assert sum(abs(one - other) < 1e-4 for one, other in zip(exact, scores, strict=True)) == 2


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_have_neither_and_say_so(name, folders, tmp_path):
    with (
        LocalReranker(folders(name), quantization="nf4", **OPTIONS) as reranker,
        pytest.raises(CheckpointError, match="'nf4' is for rows without padding of a Mistral, Llama, Qwen2"),
    ):
        reranker.warmup()
    folder = shutil.copytree(folders(name), tmp_path / folders(name).name)
    write_early_exit(EarlyExit(32), EarlyExitConfig(layer=1), folder)
    with (
        LocalReranker(folder, cascade_depth=2, **OPTIONS) as reranker,
        pytest.raises(CheckpointError, match="a cascade and its early exit need a Mistral, Llama, Qwen2"),
    ):
        reranker.warmup()
