"""Linears in 4 bits: what they compute, by value; what they hold; where they are refused."""

import json
import sys

import pytest
import torch
from command import run as run_command

from mistral_rerank import MissingDependencyError, SettingsError, open_reranker
from mistral_rerank.local.model.quantization import ActivationQuantizer, NF4Linear
from mistral_rerank.local.reranker import LocalReranker

NF4 = (  # the 16 values, from QLoRA's appendix E (arXiv 2305.14314)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def rounded(weight):
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4)
    nearest = (blocks[..., None] / scales[..., None] - values).abs().argmin(-1)
    return (values[nearest] * scales).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_the_product_with_rounded_weights(dtype, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 96, bias=bias).to(dtype)
    states = torch.randn(7, 128).to(dtype)
    wanted = states.float() @ rounded(linear.weight.detach().float()).T
    wanted = wanted + linear.bias.detach().float() if bias else wanted
    out = torch.empty(7, 96, dtype=dtype)
    with torch.inference_mode():
        found = NF4Linear(linear)(states, ActivationQuantizer(), out)
    assert found is out
    assert torch.allclose(found.float(), wanted, rtol=0, atol=0.02 * wanted.abs().max().item())  # scales have 8 bits


def test_weights_take_four_bits_and_an_eighth():
    linear = torch.nn.Linear(1024, 1024, bias=False)
    small = NF4Linear(linear)
    nested = small._scales.state2
    held = [small._weight, small._scales.absmax, nested.absmax, nested.code]
    bits = 8 * sum(tensor.numel() * tensor.itemsize for tensor in held) / linear.weight.numel()
    assert 4.1 < bits < 4.15


def test_scores_do_not_depend_on_the_batch(tiny):
    pairs = [("who wrote faust", f"passage {n} " + "word " * n) for n in range(12)]
    with LocalReranker(str(tiny), device="cpu", dtype="float32", quantization="nf4") as reranker:
        together = [score.logit for score in reranker.score_pairs(pairs)]
        alone = [reranker.score_pairs([pair])[0].logit for pair in pairs]
    assert alone == pytest.approx(together, abs=1e-4)


def test_where_it_cannot_run_it_is_refused_at_once(monkeypatch):
    with pytest.raises(SettingsError, match="CUDA, not here; leave it out"):
        LocalReranker("mini", device="meta", quantization="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mistral-rerank\[nf4\]'"):
        open_reranker("mini", device="cpu", quantization="nf4")


def test_the_benchmark_says_what_it_costs(tiny):
    command = ["bench", "--model", str(tiny), "--workload", "nq", "--rounds", "1", "--device", "cpu"]
    done = run_command(*command, "--quantization", "nf4", "--json")
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
    report = json.loads(done.stdout)
    ((baseline,),) = (row["against"] for row in report["rows"])
    assert baseline["name"] == "without nf4"
    assert baseline["largest_difference"] > 0
