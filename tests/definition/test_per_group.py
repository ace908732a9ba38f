"""Mixture of grouped experts (MoGE) against its formula, one group at a time, in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.export.model_spec import Unsupported
from moeify.export.routers import token_choice_of
from moeify.routers import PerGroup, TopK
from strategies import agree, doubled, route, seeds, sharpen

T, D = 9, 6


@pytest.mark.parametrize(("experts", "count", "each"), [(8, 4, 1), (8, 2, 2), (6, 1, 3), (6, 6, 1)])
def test_a_token_uses_the_best_experts_of_every_group(experts, count, each):
    router = TopK(D, experts, k=count * each, normalize=False, expert_groups=PerGroup(count, each))
    moe = MoE(router, Each([nn.Linear(D, 3, bias=False) for _ in range(experts)]))
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        z = torch.exp(p["router.weight"] @ token)
        scores, y = z / z.sum(), 0
        for group in torch.arange(experts).view(count, -1).tolist():
            for e in sorted(group, key=lambda e: -scores[e].item())[:each]:
                y = y + scores[e] * (p[f"experts.experts.{e}.weight"] @ token)
        slow.append(y)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


@given(seed=seeds, count=st.integers(1, 4), size=st.integers(1, 4), data=st.data())
def test_every_group_has_the_same_number_of_rows(seed, count, size, data):
    torch.manual_seed(seed)
    each = data.draw(st.integers(1, size))
    router = TopK(D, count * size, k=count * each, normalize=False, expert_groups=PerGroup(count, each))
    router.weight.data.normal_(std=10)  # a router that would send all tokens to few experts
    counts = route(router, torch.randn(1, D) + 0.1 * torch.randn(T, D)).counts
    assert counts.view(count, -1).sum(-1).tolist() == [T * each] * count


@pytest.mark.parametrize(
    ("groups", "k", "reason"),
    [
        (PerGroup(3), 3, "8 experts cannot be divided into 3 groups"),
        (PerGroup(4), 2, "are 4 per token, and k=2"),
        (PerGroup(4, 3), 12, "12 experts per token out of 8"),
        (PerGroup(2, 0), 2, "are 0 per token"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, k, reason):
    with pytest.raises(ValueError, match=reason):
        TopK(D, 8, k=k, expert_groups=groups)


def test_no_other_program_stores_it():
    with pytest.raises(Unsupported, match="as many experts of every group"):
        token_choice_of(TopK(D, 8, k=4, expert_groups=PerGroup(4)))
