import pytest
import torch
from torch import nn

from mistral_rerank.training.int8 import Int8Linear


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(96, 40, bias=False)


def relative(found, right):
    return ((found - right).norm() / right.norm()).item()


def test_outputs_and_gradients_are_those_of_the_linear_within_the_rounding(linear):
    x = torch.randn(3, 7, 96) * torch.logspace(-3, 3, 7).view(1, 7, 1)  # rows of very different size
    quantized = Int8Linear(linear)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, right = quantized(ours), linear(theirs)
    weights = torch.randn_like(right)
    (y * weights).sum().backward()
    (right * weights).sum().backward()
    assert y.shape == right.shape
    for row in range(7):
        assert relative(y[:, row], right[:, row]) < 0.02
        assert relative(ours.grad[:, row], theirs.grad[:, row]) < 0.02


def test_zeros_stay_zeros_and_the_dtype_is_kept(linear):
    y = Int8Linear(linear)(torch.zeros(2, 96, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.zeros(2, 40, dtype=torch.bfloat16))


def test_weights_take_a_quarter_of_the_memory_each_way_and_are_never_saved(linear):
    quantized = Int8Linear(linear)
    assert quantized.by_output.dtype == quantized.by_input.dtype == torch.int8
    assert quantized.state_dict() == {}
    assert list(quantized.parameters()) == []


def test_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias"):
        Int8Linear(nn.Linear(4, 4))
