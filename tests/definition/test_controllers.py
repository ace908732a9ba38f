"""Controllers against their update rules, and on a router that strongly favours some experts."""

from functools import partial
from math import tanh

import pytest
import torch
from torch import nn

from moeify import Evidence, MoE, assign, losses, record
from moeify.balance import PID, SMEBU, Proportional, SparsityTarget, control
from moeify.experts import FFN, Blocks, Identity, Zero
from moeify.routers import ReLU, TopK, sigmoid

D, E, K, T = 8, 16, 4, 512


def lopsided(experts=None) -> tuple[nn.Module, torch.optim.Optimizer]:
    router = TopK(D, E, k=K, score=sigmoid, selection_bias=True, bias=True)
    nn.init.normal_(router.weight)
    router.bias.data.copy_(torch.linspace(-2, 2, E))
    model = nn.Sequential(MoE(router, experts or Identity(E)))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def step(model, optimizer) -> list[float]:
    """One optimizer step; the rows that were assigned to its experts."""
    with record(model) as decisions:
        model(torch.randn(T, D)).sum().backward()
    optimizer.step()
    return decisions["0"].assigned.tolist()


def violation(load: list[float]) -> float:
    return max(load) / (sum(load) / len(load)) - 1


def test_proportional_moves_every_bias_by_what_its_share_lacks():
    model, optimizer = lopsided()
    control(model, optimizer, Proportional(rate=0.5))
    load = step(model, optimizer)
    expected = [0.5 * (1 / E - c / (T * K)) for c in load]
    assert model[0].router.selection_bias.tolist() == pytest.approx(expected, abs=1e-6)


def test_proportional_with_free_experts_is_longcats_update_of_the_real_ones():
    real, k_real, rate = 10, 2.5, 0.5
    model, optimizer = lopsided()
    control(model, optimizer, Proportional(rate, real=real, k=k_real))
    load = step(model, optimizer)
    expected = [rate * (k_real / K / real - load[i] / (K * T)) for i in range(real)] + [0.0] * (E - real)
    assert model[0].router.selection_bias.tolist() == pytest.approx(expected, abs=1e-6)


def test_proportional_holds_the_number_of_real_experts_per_token():
    model, optimizer = lopsided(Blocks([FFN(10, D, 4), Zero(6)]))
    control(model, optimizer, Proportional(rate=1.0, real=10, k=2.5))
    loads = [step(model, optimizer) for _ in range(100)]
    real = [sum(load[:10]) / T for load in loads]
    assert abs(real[0] - 2.5) > 0.5
    assert sum(real[-10:]) / 10 == pytest.approx(2.5, abs=0.1)


def test_pid_is_its_three_terms_step_by_step():
    rate, integral, derivative, real, k_real = 0.3, 0.2, 0.7, 10, 2.5
    model, optimizer = lopsided()
    running = control(model, optimizer, PID(rate, integral, derivative, real, k_real))
    bias, errors = [0.0] * E, []
    for _ in range(4):
        load = step(model, optimizer)
        errors.append([k_real / K / real - load[j] / (K * T) if j < real else 0.0 for j in range(E)])
        before = errors[-2] if len(errors) > 1 else errors[-1]
        for j in range(E):
            total = sum(error[j] for error in errors)
            bias[j] += rate * (errors[-1][j] + integral * total + derivative * (errors[-1][j] - before[j]))
        assert model[0].router.selection_bias.tolist() == pytest.approx(bias, abs=1e-6)
    assert {value.dtype for value in running.memory["0"].values()} == {torch.float32}


def test_pid_without_its_other_terms_is_proportional():
    found = []
    for rule in (PID(0.5, real=10), Proportional(0.5, real=10)):
        torch.manual_seed(0)
        model, optimizer = lopsided()
        control(model, optimizer, rule)
        for _ in range(3):
            step(model, optimizer)
        found.append(model[0].router.selection_bias)
    assert torch.equal(*found)


def test_an_error_that_stays_has_no_derivative_and_a_growing_integral():
    rule, memory = PID(rate=1.0, integral=0.5, derivative=100.0), {}
    seen = {"load": torch.tensor([3.0, 1.0])}
    bias = torch.zeros(2)
    for n in range(1, 5):
        moved = rule.move(bias, seen, memory)
        assert (moved - bias).tolist() == pytest.approx([-0.25 * (1 + 0.5 * n), 0.25 * (1 + 0.5 * n)])
        bias = moved


def test_more_real_experts_than_there_are_is_refused():
    model, optimizer = lopsided()
    control(model, optimizer, Proportional(real=E + 1))
    with pytest.raises(ValueError, match="real=17 experts out of 16"):
        step(model, optimizer)


def test_smebu_is_its_momentum_step_by_step():
    rate, kappa, beta = 0.1, 2.0, 0.5
    model, optimizer = lopsided()
    control(model, optimizer, SMEBU(rate, kappa, beta))
    bias, momentum = [0.0] * E, [0.0] * E
    for _ in range(3):
        load = step(model, optimizer)
        mean = sum(load) / E
        delta = [rate * tanh(kappa * (mean - c) / mean) for c in load]
        momentum = [beta * m + (1 - beta) * (d - sum(delta) / E) for m, d in zip(momentum, delta, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
        assert model[0].router.selection_bias.tolist() == pytest.approx(bias, abs=1e-6)


def test_layers_have_momenta_of_their_own():
    model, _ = lopsided()
    model = nn.Sequential(model[0], lopsided()[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    running = control(model, optimizer, SMEBU())
    model(torch.randn(T, D)).sum().backward()
    optimizer.step()
    assert running.memory.keys() == {"0", "1"}
    assert not torch.equal(running.memory["0"]["momentum"], running.memory["1"]["momentum"])


@pytest.mark.parametrize("rule", [Proportional(rate=1.0), PID(1.0, 0.01, 0.5), SMEBU(rate=0.02)])
def test_a_lopsided_router_is_balanced_in_sixty_steps(rule):
    model, optimizer = lopsided()
    control(model, optimizer, rule)
    violations = [violation(step(model, optimizer)) for _ in range(60)]
    assert violations[0] > 1.0
    assert violations[-1] < 0.35


def decision(rows: int, tokens: int):
    """`rows` rows, one expert each, for `tokens` tokens."""
    logits = torch.zeros(tokens, 4)
    chosen = torch.zeros(rows, 1, dtype=torch.int64)
    return assign(chosen, torch.ones(rows, 1), 4, shape=(max(rows, tokens),), evidence=Evidence(logits=logits))


@pytest.mark.parametrize(("rows", "expected"), [(31, 1.2), (30, 1.0), (29, 1 / 1.2)])
def test_the_weight_rises_where_more_than_k_experts_run_and_falls_where_fewer_do(rows, expected):
    target = SparsityTarget(k=1.5, value=1.0)
    target.observe(decision(10, 10))
    target.observe(decision(rows - 10, 10))
    target.step()
    assert target.value == pytest.approx(expected)
    target.step()
    assert target.value == pytest.approx(expected)  # nothing seen, nothing moved


def test_remoe_arrives_at_the_sparsity_that_is_aimed_at():
    model, teacher = (nn.Sequential(MoE(ReLU(D, E), FFN(E, D, 4))) for _ in range(2))
    for moe in (model[0], teacher[0]):
        nn.init.normal_(moe.router.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    target, loss = SparsityTarget(k=2, factor=1.05, value=1e-2), partial(losses.l1, k=2)
    x = torch.randn(128, D) + 1  # a linear map without bias needs a mean to lean on
    wanted = 3 * teacher(x).detach()
    used = []
    for _ in range(400):
        with record(model) as decisions:
            y = model(x)
        optimizer.zero_grad()
        routing = decisions["0"]
        ((y - wanted).square().mean() + target.value * loss(routing)).backward()
        optimizer.step()
        target.observe(routing)
        target.step()
        used.append(routing.counts.sum().item() / len(x))
    assert used[0] > 5
    assert sum(used[-150:]) / 150 == pytest.approx(2, abs=0.4)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 2, "factor": 1.0}, {"k": 2, "value": 0.0}])
def test_a_weight_that_cannot_be_steered_is_refused(options):
    with pytest.raises(ValueError, match="controlled only with"):
        SparsityTarget(**options)
