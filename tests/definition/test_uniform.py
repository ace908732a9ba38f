"""Weights that look at no token: the sum over experts, written out."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import LoRA
from moeify.routers import Uniform
from strategies import agree, doubled, route

D, E, T = 6, 4, 9


@pytest.mark.parametrize("weights", [None, (0.5, -1.0, 0.0, 2.0)])
def test_every_expert_output_has_its_weight(weights):
    moe, x = MoE(Uniform(D, E, weights=weights), LoRA(E, D, rank=3)), torch.randn(T, D, requires_grad=True)
    nn.init.normal_(moe.experts.lora_B)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = [
        sum((weights or [1 / E] * E)[j] * p["experts.lora_B"][j] @ (p["experts.lora_A"][j] @ u) for j in range(E))
        for u in x64
    ]
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def test_one_expert_is_the_expert_itself():
    assert route(Uniform(D, 1), torch.randn(T, D)).weight.tolist() == [1.0] * T


def test_weights_that_sum_to_one_keep_what_identical_experts_say():
    assert Uniform(D, 3).weights_sum_to_one
    assert Uniform(D, 2, weights=[1.5, -0.5]).weights_sum_to_one
    assert not Uniform(D, 2, weights=[1.0, 1.0]).weights_sum_to_one


def test_a_weight_is_needed_for_every_expert():
    with pytest.raises(ValueError, match="3 weights for 4 experts; give one weight per expert"):
        Uniform(D, E, weights=[1, 2, 3])
