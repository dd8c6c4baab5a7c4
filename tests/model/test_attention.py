"""Attention: any number of queries at a time gives what PyTorch's fused kernel gives, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from robofactory.model import attention
from robofactory.model.attention import CausalAttention, attend, causal_weights

NUM_KEYS = 11


def make_inputs(num_queries: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, keys, values: 2 samples, 3 heads of 4; laid out as projections are, heads beside each other."""
    torch.manual_seed(0)
    lengths = (num_queries, NUM_KEYS, NUM_KEYS)
    return [torch.randn(2, length, 3, 4, dtype=dtype).transpose(1, 2).requires_grad_() for length in lengths]


def padding() -> torch.Tensor:
    visible = torch.ones(2, NUM_KEYS, dtype=torch.bool)
    visible[0, 4:7] = visible[1, 8] = False
    return visible


@pytest.mark.parametrize("visible", [None, padding()], ids=["whole", "padded"])
@pytest.mark.parametrize("num_queries", [NUM_KEYS, 5, 1])
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_parts_of_the_queries_give_what_the_fused_kernel_gives(visible, num_queries: int, at_once: int, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", at_once)
    inputs = make_inputs(num_queries)
    answers = []
    for fused in (True, False):
        attended = attend(*inputs, visible, fused)
        answers.append([attended, *torch.autograd.grad((attended * torch.arange(4)).sum(), inputs)])
    torch.testing.assert_close(answers[0], answers[1])


def test_the_backward_pass_is_the_derivative(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
    assert gradcheck(lambda *inputs: CausalAttention.apply(*inputs, padding()), make_inputs(9))


def test_in_bfloat16_it_is_near_the_truth(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 4)
    query, keys, values = (x.detach() for x in make_inputs(NUM_KEYS))
    expected = F.scaled_dot_product_attention(query, keys, values, is_causal=True)
    rounded = [x.bfloat16().requires_grad_() for x in (query, keys, values)]
    attended = attend(*rounded, None, fused=False)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.double(), expected, atol=0.03, rtol=0.02)
    attended.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in rounded)


def test_nobody_looks_at_the_future_or_at_padding():
    weights = causal_weights(*make_inputs(5)[:2], padding())
    assert weights.shape == (2, 3, 5, NUM_KEYS) and not weights.requires_grad
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 5, dtype=torch.float64))
    future = torch.ones(5, NUM_KEYS, dtype=torch.bool).triu(NUM_KEYS - 5 + 1)
    assert (weights[..., future] == 0).all() and (weights[0, ..., 4:7] == 0).all() and (weights[1, ..., 8] == 0).all()
    assert (weights[1, :, 0, :7] > 0).all()
