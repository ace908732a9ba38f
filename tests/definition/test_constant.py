"""Constant experts, and what experts cost, against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from moeify.experts import FFN, Blocks, Constant, Each, Glu, Identity, Plain, Zero
from moeify.losses import balance, cost
from moeify.routers import TopK
from strategies import agree, doubled, route

E, D = 4, 5
COUNTS = torch.tensor([3, 0, 1, 2])
OWNER = [0, 0, 0, 2, 3, 3]


def test_a_constant_expert_mixes_the_token_with_its_vector():
    experts, rows = Constant(E, D), torch.randn(6, D, requires_grad=True)
    rows64, own = rows.detach().double().requires_grad_(), doubled(experts)
    slow = []
    for row, e in zip(rows64, OWNER, strict=True):
        a = torch.exp(own["weight"][e] @ row)
        slow.append((a[0] * row + a[1] * own["vector"][e]) / (a[0] + a[1]))
    agree(experts(rows, COUNTS), [rows, *experts.parameters()], torch.stack(slow), [rows64, *own.values()])


def test_experts_cost_what_they_compute():
    experts = Blocks([FFN(2, D, 8), FFN(1, D, 2), Constant(2, D), Identity(), Zero()])
    assert experts.costs.tolist() == [1, 1, 0.25, 0, 0, 0, 0]
    assert FFN(3, D, 8).costs.tolist() == Each([torch.nn.Linear(D, D)] * 3).costs.tolist() == [1, 1, 1]
    assert Blocks([Identity(), Zero()]).costs.tolist() == [0, 0]


@pytest.mark.parametrize("costs", [[1.0, 1.0, 0.75, 0.75], [1.0, 0.5, 0.0, 0.25]])
def test_the_cost_of_a_decision_is_its_balance_weighed_by_cost(costs):
    router, x = TopK(D, E), torch.randn(30, D)
    decision = route(router, x)
    weight = router.weight.detach().double().requires_grad_()
    p = [torch.exp(weight @ token) / torch.exp(weight @ token).sum() for token in x.double()]
    slow = torch.zeros((), dtype=torch.float64)
    for j, c in enumerate(costs):
        f = sum(j in choice for choice in decision.choices.indices.tolist()) / (30 * 2)
        slow = slow + E * c / (sum(costs) / E) * f * sum(row[j] for row in p) / 30
    agree(cost(decision, torch.tensor(costs)), [router.weight], slow, [weight])


def test_equal_costs_are_plain_balance():
    decision = route(TopK(D, E), torch.randn(30, D))
    torch.testing.assert_close(cost(decision, torch.full((E,), 3.0)), balance(decision))


def test_a_step_down_the_cost_uses_dear_experts_less():
    router, x = TopK(D, E), torch.randn(200, D)
    bank = Blocks([FFN(2, D, 8, activation=Plain(F.relu)), FFN(1, D, 8, activation=Glu(F.silu)), Identity()])
    before = route(router, x)
    cost(before, bank.costs).backward()
    with torch.no_grad():
        router.weight -= 5 * router.weight.grad
        after = route(router, x)
    assert (after.counts * bank.costs).sum() < (before.counts * bank.costs).sum()
