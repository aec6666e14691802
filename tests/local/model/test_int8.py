"""Linears in 8 bits: what they compute, by value; where they are refused; what they cost."""

import json
import pickle

import pytest
import torch
from command import run as run_command

from mistral_rerank import SettingsError, open_reranker
from mistral_rerank.local.model.quantization import QMAX, ActivationQuantizer, Int8Linear, multiplies_bytes
from mistral_rerank.local.reranker import LocalReranker

here = pytest.mark.skipif(not multiplies_bytes(), reason="this CPU has no VNNI instructions")
PAIRS = [("who wrote faust", f"passage {n} " + "word " * n) for n in range(12)]


def rounded(states, steps):
    scale = states.abs().amax(-1, keepdim=True) / steps
    return (states / scale).round() * scale


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_the_product_of_rounded_factors(dtype, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=bias).to(dtype)
    states = torch.randn(7, 96).to(dtype)
    states[1] *= 1000  # another token's size must not matter
    wanted = rounded(states.float(), QMAX) @ rounded(linear.weight.detach().float(), 127).T
    wanted = wanted + linear.bias.detach().float() if bias else wanted
    with torch.inference_mode():
        found = Int8Linear(linear)(states, ActivationQuantizer())
    assert (found.dtype, found.shape) == (dtype, (7, 40))
    allowed = (2e-2 if dtype == torch.bfloat16 else 1e-2) * wanted.abs().amax(-1, keepdim=True)
    assert ((found.float() - wanted).abs() <= allowed).all()


@here
def test_a_token_of_zeros_gives_the_bias_and_one_that_is_no_number_stays_none():
    linear = torch.nn.Linear(32, 8)
    states = torch.zeros(2, 32)
    states[1, 3] = float("nan")
    with torch.inference_mode():
        found = Int8Linear(linear)(states, ActivationQuantizer())
    assert torch.equal(found[0], linear.bias)
    assert found[1].isnan().all()


def test_rounding_is_the_same_while_another_model_is_loaded():
    """Loading sets the default dtype of the process for a moment."""
    states = torch.randn(5, 64)
    expected = ActivationQuantizer()(states)[0].clone()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(ActivationQuantizer()(states)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_linears_with_one_input_round_it_once():
    quantizer = ActivationQuantizer()
    states = torch.randn(3, 16)
    first = quantizer(states)
    assert quantizer(states) is first
    assert quantizer(states.clone()) is not first


@here
def test_scores_are_near_and_do_not_depend_on_the_batch(tiny):
    options = {"device": "cpu", "dtype": "float32"}
    with (
        LocalReranker(str(tiny), **options) as whole,
        LocalReranker(str(tiny), quantization="int8", **options) as ours,
    ):
        exact, near = ([score.logit for score in reranker.score_pairs(PAIRS)] for reranker in (whole, ours))
        alone = [ours.score_pairs([pair])[0].logit for pair in PAIRS]
    spread = max(exact) - min(exact)
    assert 1e-3 * spread < max(abs(a - b) for a, b in zip(exact, near, strict=True)) < 0.1 * spread
    assert alone == pytest.approx(near, abs=1e-4)


def test_where_it_cannot_run_it_is_refused_at_once(monkeypatch):
    if multiplies_bytes():
        with pytest.raises(SettingsError, match="float32"):
            LocalReranker("mini", device="cpu", dtype="float16", quantization="int8")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(SettingsError, match="VNNI"):
        LocalReranker("mini", device="cpu", quantization="int8")
    with pytest.raises(SettingsError, match="not here; leave it out"):
        LocalReranker("mini", device="meta", quantization="int8")
    with pytest.raises(SettingsError, match="'int4' is not known"):
        LocalReranker("mini", quantization="int4")
    with pytest.raises(SettingsError, match="quantization"):
        open_reranker("mini", quantization="int4")


@here
def test_it_is_a_setting_like_others(monkeypatch):
    monkeypatch.setenv("MISTRAL_RERANK_QUANTIZATION", "int8")
    reranker = open_reranker("mini", device="cpu")
    assert reranker._options["quantization"] == "int8"
    assert pickle.loads(pickle.dumps(reranker))._options["quantization"] == "int8"


@here
def test_the_benchmark_says_what_it_costs(tiny):
    command = ["bench", "--model", str(tiny), "--workload", "nq", "--rounds", "1", "--device", "cpu"]
    done = run_command(*command, "--quantization", "int8", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    ((baseline,),) = (row["against"] for row in report["rows"])
    assert baseline["name"] == "without int8"
    assert baseline["largest_difference"] > 0
    assert ", int8" in report["machine"]["model"]
