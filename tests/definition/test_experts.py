"""Experts against their formulas, one row at a time, in fp64."""

from math import erf, exp, sqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeify.experts import FFN, Blocks, ClampedGlu, ClampedSwiGlu, Each, Glu, Identity, MultiplicativeBias, Plain, Zero
from moeify.export.experts import gated_ffns
from strategies import agree, doubled

E, D, H, O = 4, 5, 3, 2  # noqa: E741
COUNTS = torch.tensor([3, 0, 1, 2])
OWNER = [0, 0, 0, 2, 3, 3]


def silu(v):
    return v / (1 + torch.exp(-v))


def gelu(v):
    return 0.5 * v * (1 + torch.erf(v / sqrt(2)))


def slow_inner(activation, hidden):
    if isinstance(activation, Plain):
        return gelu(hidden)
    if isinstance(activation, Glu):
        return silu(hidden[:H]) * hidden[H:]
    if isinstance(activation, ClampedSwiGlu):
        return silu(hidden[:H].clamp(max=activation.limit)) * hidden[H:].clamp(-activation.limit, activation.limit)
    gate, up = hidden[0::2].clamp(max=activation.limit), hidden[1::2].clamp(-activation.limit, activation.limit)
    return (up + 1) * gate / (1 + torch.exp(-activation.alpha * gate))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [Plain(F.gelu), Glu(F.silu), ClampedGlu(limit=0.5), ClampedSwiGlu(0.5)])
def test_a_stack_of_ffns_is_each_ffn_by_itself(activation, bias):
    experts = FFN(E, D, H, activation=activation, bias=bias, width_out=O)
    for p in experts.parameters():
        nn.init.normal_(p)
    rows = torch.randn(6, D, requires_grad=True)
    p, rows64 = doubled(experts), rows.detach().double().requires_grad_()
    up = "up_proj" if isinstance(activation, Plain) else "gate_up_proj"
    slow = []
    for e, row in zip(OWNER, rows64, strict=True):
        hidden = p[up][e] @ row + (p[f"{up}_bias"][e] if bias else 0)
        slow.append(p["down_proj"][e] @ slow_inner(activation, hidden) + (p["down_proj_bias"][e] if bias else 0))
    agree(experts(rows, COUNTS), [rows, *experts.parameters()], torch.stack(slow), [rows64, *p.values()])


@pytest.mark.parametrize("activation", [Plain(F.gelu), Glu(F.silu)])
def test_a_multiplicative_bias_stands_between_the_halves_of_every_expert(activation):
    experts = MultiplicativeBias(FFN(E, D, H, activation=activation, width_out=O))
    for p in experts.parameters():
        nn.init.normal_(p)
    rows = torch.randn(6, D, requires_grad=True)
    p, rows64 = doubled(experts), rows.detach().double().requires_grad_()
    up = f"experts.{'up_proj' if isinstance(activation, Plain) else 'gate_up_proj'}"
    slow = []
    for e, row in zip(OWNER, rows64, strict=True):
        hidden = slow_inner(activation, p[up][e] @ row)
        slow.append(p["experts.down_proj"][e] @ (hidden * p["multiplicative_bias"][e]))
    agree(experts(rows, COUNTS), [rows, *experts.parameters()], torch.stack(slow), [rows64, *p.values()])


def test_a_multiplicative_bias_starts_as_nothing_and_is_folded_into_exports():
    experts, rows = MultiplicativeBias(FFN(E, D, H, width_out=O)), torch.randn(6, D)
    torch.testing.assert_close(experts(rows, COUNTS), experts.experts(rows, COUNTS))
    nn.init.normal_(experts.multiplicative_bias)
    folded = gated_ffns(experts)
    plain = FFN(E, D, H, width_out=O)
    plain.load_state_dict({"gate_up_proj": folded.gate_up, "down_proj": folded.down})
    torch.testing.assert_close(experts(rows, COUNTS), plain(rows, COUNTS))


def test_a_clamped_gate_has_no_lower_bound():
    activation = ClampedGlu()
    gate, up = -9.0, 30.0
    expected = (7.0 + 1) * gate / (1 + exp(1.702 * -gate))
    assert activation(torch.tensor([[gate, up]])).item() == pytest.approx(expected, rel=1e-5)
    assert gelu(torch.tensor(1.0)).item() == pytest.approx(0.5 * (1 + erf(1 / sqrt(2))))


def test_each_calls_every_module_on_its_own_rows():
    modules = [nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, O)) for _ in range(E)]
    rows = torch.randn(6, D)
    slow = torch.cat([modules[e](row.unsqueeze(0)) for e, row in zip(OWNER, rows, strict=True)])
    torch.testing.assert_close(Each(modules)(rows, COUNTS), slow)


def test_every_module_of_each_gets_a_gradient_even_without_rows():
    experts = Each([nn.Linear(D, O) for _ in range(E)])
    experts(torch.randn(6, D), COUNTS).sum().backward()
    assert all(p.grad is not None for p in experts.parameters())
    assert experts.experts[1].weight.grad.abs().sum() == 0


def test_blocks_give_every_group_the_rows_of_its_experts():
    large, small = FFN(1, D, 8), FFN(2, D, 2)
    rows = torch.randn(10, D)
    counts = torch.tensor([2, 3, 0, 1, 4])
    y = Blocks([large, small, Identity(), Zero()])(rows, counts)
    torch.testing.assert_close(y[:2], large(rows[:2], counts[:1]))
    torch.testing.assert_close(y[2:5], small(rows[2:5], counts[1:3]))
    assert torch.equal(y[5:6], rows[5:6])
    assert torch.equal(y[6:], torch.zeros(4, D))


def test_zero_experts_may_have_outputs_of_another_width():
    assert Zero(2, width_out=3)(torch.randn(5, D), torch.tensor([1, 4])).shape == (5, 3)


def test_expert_dropout_drops_hidden_units_in_training_only():
    experts = FFN(1, D, 64, dropout=0.9)
    rows, counts = torch.randn(3, D), torch.tensor([3])
    assert not torch.equal(experts(rows, counts), experts(rows, counts))
    experts.eval()
    assert torch.equal(experts(rows, counts), experts(rows, counts))
