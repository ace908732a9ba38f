"""What is summed over ranks ahead of a step is summed once, also beyond the process group, or forgotten."""

import pytest
import torch

from moeify import MoE, ranks
from moeify.balance import Sign, SparsityTarget, control
from moeify.experts import FFN
from moeify.record import record
from moeify.routers import TopK
from moeify.train import StepLoss


def doubled(tensor):
    """Another process has seen the same."""
    tensor *= 2


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return MoE(TopK(8, 4, k=2, selection_bias=True), FFN(4, 8, 8))


def test_a_controller_moves_by_loads_that_were_summed_once(layer):
    seen = []

    class Recording(Sign):
        def move(self, bias, seen_, memory):
            seen.append(seen_["load"].clone())
            return super().move(bias, seen_, memory)

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    running = control(layer, optimizer, Recording())
    for _ in range(2):
        layer(torch.randn(6, 8)).sum().backward()
        with ranks.summed_beyond(doubled):
            running.gather()
            running.gather()
        optimizer.step()
    assert [load.sum().item() for load in seen] == [24, 24]


def test_a_controller_that_forgets_moves_no_bias(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    running = control(layer, optimizer, Sign(0.1))
    layer(torch.randn(6, 8)).sum().backward()
    running.gather()
    running.forget()
    optimizer.step()
    assert not layer.router.selection_bias.any()
    layer(torch.randn(6, 8)).sum().backward()
    optimizer.step()
    assert layer.router.selection_bias.any()


def test_a_weight_of_a_loss_moves_by_counts_that_were_summed_once_or_stays(layer):
    target = SparsityTarget(3.0, value=1.0)
    with record(layer) as decisions, torch.no_grad():
        layer(torch.randn(6, 8))
    target.observe(decisions[""])
    target.forget()
    target.step()
    assert target.value == 1.0
    target.observe(decisions[""])
    with ranks.summed_beyond(doubled):
        target.gather()
        target.gather()
    assert target._seen.tolist() == [24, 12]
    target.step()
    assert target.value == pytest.approx(1 / 1.2)


def test_loads_are_summed_once_and_outside_the_context_over_ranks_alone(layer):
    with record(layer) as decisions, torch.no_grad():
        layer(torch.randn(6, 8))
    loss = StepLoss()
    for rows in (24, 12):
        loss.begin([{"inputs": torch.randn(6, 8)}])
        loss.add(list(decisions.items()))
        if rows == 24:
            with ranks.summed_beyond(doubled):
                loss.gather()
                loss.gather()
        loss.end()
        assert loss.assigned[""].sum() == rows
