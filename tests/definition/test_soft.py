"""Soft MoE against equations 1 to 3, one slot and one token at a time, in fp64."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import Soft
from strategies import agree, doubled

B, N, D, E = 2, 5, 6, 3


def unit(v):
    return v / torch.sqrt(sum(v_i * v_i for v_i in v) + 1e-6)


def softmax(values):
    total = sum(torch.exp(v) for v in values)
    return [torch.exp(v) / total for v in values]


def slow_soft(tokens, p, slots):
    """The outputs for the tokens of one image."""
    logits = [[p["router.scale"][0] * (unit(x) @ unit(mu)) for mu in p["router.queries"]] for x in tokens]
    dispatch = [softmax([logits[n][s] for n in range(len(tokens))]) for s in range(E * slots)]  # D, eq. 1
    mixed = [sum(d * x for d, x in zip(column, tokens, strict=True)) for column in dispatch]
    expert_outputs = [p[f"experts.experts.{s // slots}.weight"] @ mixed[s] for s in range(E * slots)]
    combine = [softmax(row) for row in logits]  # C, eq. 2
    return [sum(c * expert_output for c, expert_output in zip(row, expert_outputs, strict=True)) for row in combine]


def layer(slots):
    moe = MoE(Soft(D, E, slots=slots), Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    nn.init.constant_(moe.router.scale, 3.0)
    return moe


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_moe_is_its_equations(slots):
    moe = layer(slots)
    x = torch.randn(B, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = torch.stack([torch.stack(slow_soft(tokens, p, slots)) for tokens in x64])
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *p.values()])


def test_with_padding_soft_moe_is_its_equations_over_the_real_tokens():
    moe = layer(2)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    moe.context.mask(mask)
    x = torch.randn(3, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = torch.zeros(3, N, 3, dtype=torch.float64)
    for b in range(2):
        slow[b, mask[b]] = torch.stack(slow_soft(x64[b, mask[b]], p, 2))
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *p.values()])
