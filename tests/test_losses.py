"""Laws of the losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import Assignment, Evidence, Mixture, assign, losses
from moeify.routers import TopK, sigmoid
from strategies import route, seeds, sharpen


def even(num_experts: int, k: int, scores: torch.Tensor | None = None) -> Assignment:
    """Token t is assigned to experts t, t + 1, ... t + k - 1: every expert has k tokens."""
    index = (torch.arange(num_experts).unsqueeze(1) + torch.arange(k)) % num_experts
    scores = torch.full((num_experts, num_experts), 1 / num_experts) if scores is None else scores
    return assign(index, torch.full((num_experts, k), 1 / k), num_experts, evidence=Evidence(
        scores=scores, logits=scores.log(), sequence_id=torch.zeros(num_experts, dtype=torch.int64)))  # fmt: skip


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@given(st.integers(1, 9), st.data())
def test_perfect_balance_is_one_for_every_k(scope, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    assert losses.balance(even(num_experts, k), scope).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@given(st.integers(2, 9), st.data())
def test_collapse_costs_as_many_times_more_as_experts_are_unused(scope, num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    scores = torch.zeros(4, num_experts)
    scores[:, :k] = 1 / k
    index = torch.arange(k).expand(4, k)
    group = torch.tensor([0, 0, 1, 1])
    routing = assign(index, torch.full((4, k), 1 / k), num_experts, evidence=Evidence(scores=scores, sequence_id=group))
    assert losses.balance(routing, scope).item() == pytest.approx(num_experts / k, rel=1e-5)


def test_the_gradient_of_balance_lowers_the_experts_that_are_asked_for_too_often():
    router = TopK(4, 3, k=1, normalize=False)
    sharpen(router)
    routing = route(router, torch.randn(50, 4).abs())
    scores = routing.scores.detach().requires_grad_()
    busy = assign(torch.zeros(50, 1, dtype=torch.int64), torch.ones(50, 1), 3, evidence=Evidence(scores=scores))
    losses.balance(busy).backward()
    assert (scores.grad[:, 0] > 0).all()
    assert (scores.grad[:, 1:] < 0).all()


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), seeds)
def test_balance_by_sequence_is_the_token_weighted_mean_of_its_micro_batches(micro_batches, seed):
    torch.manual_seed(seed)
    router = TopK(6, 5, score=sigmoid)
    sharpen(router)
    lengths = torch.randint(1, 7, (sum(micro_batches),))
    mask = torch.arange(6) < lengths.unsqueeze(1)
    x = torch.randn(*mask.shape, 6)
    whole = losses.balance(route(router, x, mask), "sequence")
    parts = [
        losses.balance(route(router, tokens, real), "sequence") * real.sum()
        for tokens, real in zip(x.split(micro_batches), mask.split(micro_batches), strict=True)
    ]
    torch.testing.assert_close(whole, sum(parts) / mask.sum())
    for_whole = torch.autograd.grad(whole, router.weight)[0]
    for_parts = torch.autograd.grad(sum(parts) / mask.sum(), router.weight)[0]
    torch.testing.assert_close(for_whole, for_parts)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), seeds)
def test_with_the_demand_of_the_step_micro_batches_add_up_to_the_whole_batch(micro_batches, seed):
    torch.manual_seed(seed)
    router = TopK(6, 5)
    sharpen(router)
    x = torch.randn(sum(micro_batches), 6)
    whole = route(router, x)
    parts = [
        losses.balance(route(router, part), assigned=whole.assigned) * len(part) for part in x.split(micro_batches)
    ]
    torch.testing.assert_close(losses.balance(whole), sum(parts) / len(x))


@pytest.mark.parametrize("loss", [losses.importance, losses.load_loss])
def test_even_weights_have_no_variation(loss):
    assert loss(even(6, 2)).item() == pytest.approx(0.0, abs=1e-6)


def test_scores_that_are_no_distribution_are_made_one():
    router = TopK(6, 5, score=sigmoid)
    torch.testing.assert_close(losses.probability(route(router, torch.randn(4, 6))).sum(-1), torch.ones(4))


def test_several_gates_count_by_their_sum():
    index, gates = torch.tensor([[0], [1], [1]]), torch.rand(3, 1, 2)
    torch.testing.assert_close(
        losses.importance(assign(index, gates, 2)), losses.importance(assign(index, gates.sum(-1), 2))
    )


def test_what_a_decision_does_not_keep_cannot_be_a_loss():
    silent = assign(torch.tensor([[0]]), torch.ones(1, 1), 2)
    with pytest.raises(ValueError, match="keeps no scores"):
        losses.balance(silent)
    with pytest.raises(ValueError, match="no logits"):
        losses.z(silent)
    with pytest.raises(ValueError, match="no logits"):
        losses.z(Mixture(counts=torch.tensor([1]), into=torch.ones(1, 1), out_of=torch.ones(1, 1)))


def test_balance_by_sequence_needs_a_decision_per_token():
    router = TopK(6, 5, per="sequence")
    routing = route(router, torch.randn(2, 4, 6))
    assert losses.balance(routing).isfinite()
    with pytest.raises(ValueError, match="a decision of its own for every token"):
        losses.balance(routing, "sequence")
