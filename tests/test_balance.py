import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeify import MoE, record
from moeify.balance import Quantile, Sign, control
from moeify.experts import FFN, Identity
from moeify.routers import Capacity, ExpertGroups, TopK, sigmoid
from strategies import layer, sharpen

D, E, K, T = 8, 16, 4, 512


def balanced_by(**options) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of one layer whose router strongly favours some experts, and an optimizer that moves nothing."""
    router = TopK(D, E, k=K, score=sigmoid, selection_bias=True, bias=True, **options)
    sharpen(router)
    router.bias.data.copy_(torch.linspace(-2, 2, E))
    model = nn.Sequential(MoE(router, Identity(E)))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


def steps(model, optimizer, count, micro_batches=1):
    """MaxVio of every step: how much busier than fair the busiest expert is."""
    violations = []
    for _ in range(count):
        demand = 0
        for _ in range(micro_batches):
            with record(model) as decisions:
                model(torch.randn(T, D)).sum().backward()
            demand = demand + decisions["0"].assigned
        optimizer.step()
        violations.append((demand.max() / demand.float().mean() - 1).item())
    return violations


def test_sign_moves_every_bias_by_its_rate_towards_the_underloaded():
    model, optimizer = balanced_by()
    control(model, optimizer, Sign(rate=0.01))
    with record(model) as decisions:
        model(torch.randn(T, D)).sum().backward()
    optimizer.step()
    fair = T * K / E
    expected = [0.01 * ((load < fair) - (load > fair)) for load in decisions["0"].assigned.tolist()]
    assert model[0].router.selection_bias.tolist() == pytest.approx(expected)


def test_quantile_is_the_dual_update_written_as_a_loop():
    model, optimizer = balanced_by()
    running = control(model, optimizer, Quantile())
    model[0].router.selection_bias.copy_(torch.randn(E) / 10)
    old = model[0].router.selection_bias.tolist()
    with record(model) as decisions:
        model(torch.randn(T, D))
    s = decisions["0"].scores.tolist()
    beta = [-b for b in old]
    alpha = [sorted((s_i[j] - beta[j] for j in range(E)), reverse=True)[K] for s_i in s]
    wanted = [-sorted((s[i][j] - alpha[i] for i in range(T)), reverse=True)[T * K // E] for j in range(E)]
    running.step()
    centred = [w - sum(wanted) / E for w in wanted]
    assert model[0].router.selection_bias.tolist() == pytest.approx(centred, abs=1e-5)


def test_quantile_balances_a_skewed_router_in_a_few_steps():
    model, optimizer = balanced_by()
    control(model, optimizer, Quantile())
    violations = steps(model, optimizer, 5)
    assert violations[0] > 1.0
    assert max(violations[3:]) < 0.35


def test_sign_needs_many_steps():
    model, optimizer = balanced_by()
    control(model, optimizer, Sign(rate=0.02))
    violations = steps(model, optimizer, 60)
    assert violations[3] > 0.8
    assert violations[-1] < 0.4


@pytest.mark.parametrize("rule", [Sign(0.01), Quantile(), Quantile(ema=0.9)])
def test_micro_batches_of_a_step_are_seen_as_one(rule):
    model, optimizer = balanced_by()
    x = torch.randn(T, D)
    moved = []
    for parts in (1, 4):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
        control(twin, optimizer, rule)
        for part in x.repeat(4, 1).chunk(parts):
            twin(part).sum().backward()
        optimizer.step()
        moved.append(twin[0].router.selection_bias)
    torch.testing.assert_close(*moved)


def test_ema_keeps_a_share_of_the_old_bias():
    model, optimizer = balanced_by()
    router = model[0].router
    start = torch.randn(E)
    ends = []
    for ema in (0.0, 0.75):
        router.selection_bias.copy_(start)
        torch.manual_seed(1)
        running = control(model, optimizer, Quantile(ema))
        steps(model, optimizer, 1)
        running.remove()
        ends.append(router.selection_bias.clone())
    torch.testing.assert_close(ends[1], 0.75 * start + 0.25 * ends[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_counted_once(reentrant):
    model, optimizer = balanced_by()
    running = control(model, optimizer, Sign())
    for passes in (1, 2):
        checkpoint(model, torch.randn(T, D, requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert running.seen["0"]["load"].sum() == passes * T * K


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_moves_biases_as_training_without_it_does(reentrant):
    x, ends = torch.randn(T, D, requires_grad=True), []
    for repeat in (False, True):
        torch.manual_seed(0)
        model, optimizer = balanced_by()
        control(model, optimizer, Sign())
        for _ in range(3):
            with torch.no_grad():
                model(x)  # a model that generates between its steps
            y = checkpoint(model, x, use_reentrant=reentrant) if repeat else model(x)
            y.sum().backward()
            optimizer.step()
        ends.append(model[0].router.selection_bias.clone())
    assert ends[0].any()
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def test_evaluation_moves_nothing():
    model, optimizer = balanced_by()
    control(model, optimizer, Sign())
    with torch.no_grad():
        model(torch.randn(T, D))
    optimizer.step()
    assert model[0].router.selection_bias.count_nonzero() == 0


def test_a_frozen_or_removed_controller_moves_nothing():
    model, optimizer = balanced_by()
    running = control(model, optimizer, Sign())
    running.active = False
    steps(model, optimizer, 1)
    running.active = True
    running.remove()
    steps(model, optimizer, 1)
    assert model[0].router.selection_bias.count_nonzero() == 0


def test_the_bias_is_moved_between_steps_and_never_inside_one():
    model, optimizer = balanced_by()
    control(model, optimizer, Sign())
    model(torch.randn(T, D)).sum().backward()
    assert model[0].router.selection_bias.count_nonzero() == 0
    optimizer.step()
    assert model[0].router.selection_bias.count_nonzero() > 0


def test_the_bias_is_saved_with_the_model():
    model, optimizer = balanced_by()
    control(model, optimizer, Sign())
    steps(model, optimizer, 1)
    assert "0.router.selection_bias" in model.state_dict()


def test_the_demand_is_seen_behind_a_capacity_limit():
    model, optimizer = balanced_by()
    model[0].router = Capacity(model[0].router, factor=0.1, priority="choice")
    running = control(model, optimizer, Sign())
    model(torch.randn(T, D))
    assert running.seen["0"]["load"].sum() == T * K


def test_quantile_knows_k_behind_a_capacity_limit():
    model, _ = balanced_by()
    nn.init.zeros_(model[0].router.bias)
    plain = copy.deepcopy(model)
    model[0].router = Capacity(model[0].router, factor=0.01, priority="choice")
    x = torch.randn(T, D)
    moved = []
    for m in (model, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
        control(m, optimizer, Quantile())
        m(x).sum().backward()
        optimizer.step()
        moved.append(dict(m.named_buffers()).popitem()[1])
    torch.testing.assert_close(*moved)


def test_a_model_without_biases_is_refused():
    model = nn.Sequential(layer())
    with pytest.raises(ValueError, match="selection_bias=True"):
        control(model, torch.optim.SGD(model.parameters(), lr=0.0), Sign())


def test_quantile_is_refused_where_every_expert_is_chosen_anyway():
    model = nn.Sequential(layer(k=4, selection_bias=True))
    control(model, torch.optim.SGD(model.parameters(), lr=0.0), Quantile())
    with pytest.raises(ValueError, match="already uses all 4 experts"):
        model(torch.randn(3, 8))


def test_quantile_balances_choices_by_logit():
    router = TopK(D, E, k=K, select="logit", selection_bias=True, bias=True)
    sharpen(router)
    router.bias.data.copy_(torch.linspace(-2, 2, E))
    model = nn.Sequential(MoE(router, Identity(E)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control(model, optimizer, Quantile())
    assert max(steps(model, optimizer, 5)[3:]) < 0.35


@pytest.mark.parametrize("groups", [ExpertGroups(4, 2), ExpertGroups(2, 1, reduce="top2")])
def test_quantile_refuses_routers_that_limit_tokens_to_groups(groups):
    model = nn.Sequential(MoE(TopK(8, 8, expert_groups=groups, selection_bias=True), FFN(8, 8, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"router of 0 limits them to some groups, .*; use Sign\(\)"):
        control(model, optimizer, Quantile())
    assert control(model, optimizer, Sign()).biases


def test_groups_that_are_all_kept_limit_nobody():
    model = nn.Sequential(MoE(TopK(8, 8, expert_groups=ExpertGroups(4, 4), selection_bias=True), FFN(8, 8, 4)))
    assert control(model, torch.optim.SGD(model.parameters(), lr=0.0), Quantile()).biases
