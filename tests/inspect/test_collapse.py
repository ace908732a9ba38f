"""Measures of collapse against their definitions, and at values that are known."""

import math

import pytest
import torch
from torch import nn

from moeify import Evidence, MoE, assign, limit
from moeify.experts import FFN, Each
from moeify.inspect import (
    effective_rank,
    margin,
    output_similarity,
    overlap,
    participation_ratio,
    redundancy,
    representation_collapse,
    switched,
    weight_cosine,
    without_first,
)
from moeify.layers import sparse_layers
from moeify.routers import TopK
from moeify.sparsify import Recipe, copies, sparsify
from strategies import layer, route
from tiny_models import causal_lm, mixtral

D, E, T = 8, 4, 10


def decision(index, gates=None, scores=None):
    index = torch.tensor(index)
    gates = torch.ones(index.shape) if gates is None else torch.tensor(gates)
    return assign(index, gates, E, evidence=Evidence(scores=scores))


def test_the_margin_is_between_the_two_best_scores():
    scores = torch.tensor([[0.1, 0.5, 0.4, 0.0], [0.0, 0.2, 0.1, 0.7]])
    assert margin(decision([[1], [3]], scores=scores)) == pytest.approx((0.1 + 0.5) / 2)


def test_a_margin_needs_scores():
    with pytest.raises(ValueError, match="keeps its scores"):
        margin(decision([[0]]))


def test_overlap_is_the_share_of_common_experts():
    one, last = decision([[0, 1], [2, 3], [0, 1]]), decision([[1, 0], [3, 0], [2, 3]])
    assert overlap(one, last) == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_dropped_choice_is_no_choice():
    one, last = decision([[0], [0]]), limit(decision([[0], [0]]), 1)
    assert overlap(one, last) == 1.0
    assert overlap(last, one) == 0.5


def test_switched_counts_first_choices_alone():
    one, last = decision([[0, 1], [2, 3], [0, 1]]), decision([[0, 3], [3, 2], [1, 0]])
    assert switched(one, last) == pytest.approx(2 / 3)


def test_decisions_on_other_tokens_are_not_compared():
    for compare in (overlap, switched):
        with pytest.raises(ValueError, match="compared"):
            compare(decision([[0]]), decision([[0], [1]]))


def test_answers_of_equal_experts_are_alike_and_of_opposite_ones_opposite():
    one, other = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
    other.weight.data.copy_(-one.weight)
    x = torch.randn(T, D)
    assert output_similarity(Each([one, one]), x) == pytest.approx({"cosine": 1.0, "cka": 1.0}, abs=1e-5)
    assert output_similarity(Each([one, other]), x) == pytest.approx({"cosine": -1.0, "cka": 1.0}, abs=1e-5)


def test_the_cosine_of_weights_is_over_all_of_an_experts_weights():
    experts = FFN(3, D, 5)
    up, down = experts.up[0].detach(), experts.down[0].detach()
    vectors = [torch.cat([up[e].flatten(), down[e].flatten()]) for e in range(3)]
    expected = [[float(a @ b / (a.norm() * b.norm())) for b in vectors] for a in vectors]
    torch.testing.assert_close(weight_cosine(experts), torch.tensor(expected))


def test_experts_are_one_and_the_same_after_upcycling():
    model = sparsify(causal_lm("llama"), Recipe(num_experts=3, experts=copies), verbose=False)
    for moe in model.modules():
        if isinstance(moe, MoE):
            torch.testing.assert_close(weight_cosine(moe.experts), torch.ones(3, 3))


def test_the_stacked_experts_of_transformers_have_cosines_too():
    model = mixtral()
    name, layer = next(iter(sparse_layers(model).items()))
    experts = layer.experts
    assert name == "model.layers.0.mlp"
    vector = [torch.cat([p[e].detach().flatten() for p in experts.parameters()]) for e in (0, 1)]
    expected = torch.nn.functional.cosine_similarity(*vector, dim=0)
    torch.testing.assert_close(weight_cosine(experts)[0, 1], expected)


def test_experts_of_different_sizes_have_no_cosine():
    with pytest.raises(ValueError, match="different sizes"):
        weight_cosine(Each([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]))


def test_effective_rank_counts_directions_in_equal_use():
    basis = torch.linalg.qr(torch.randn(D, D)).Q
    assert effective_rank(basis[:3]) == pytest.approx(3, rel=1e-4)
    assert effective_rank(basis[:1].repeat(5, 1)) == pytest.approx(1, rel=1e-2)
    x = torch.randn(T, D)
    p = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    assert effective_rank(x) == pytest.approx(math.exp(-sum(v * math.log(v) for v in p.tolist())), rel=1e-4)


def test_participation_counts_directions_of_equal_variance():
    directions = torch.eye(D)[:3]
    assert participation_ratio(torch.cat([directions, -directions])) == pytest.approx(3, rel=1e-4)
    x = torch.randn(T, D)
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    assert participation_ratio(x) == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-4)


def test_collapse_is_the_trace_of_spread_within_over_spread_between():
    x, first = torch.randn(T, 3), [t % 3 for t in range(T)]
    x = x + 2 * torch.randn(3, 3)[first]
    means = [torch.stack([x[t] for t in range(T) if first[t] == e]).mean(0) for e in range(3)]
    centre = sum(means) / 3
    within = sum(torch.outer(x[t] - means[first[t]], x[t] - means[first[t]]) for t in range(T)) / T
    between = sum(torch.outer(m - centre, m - centre) for m in means) / 3
    slow = (within @ torch.linalg.pinv(between, rtol=1e-5)).trace().item()
    assert representation_collapse(x, decision([[e] for e in first])) == pytest.approx(slow, rel=1e-3)


def test_tokens_that_sit_on_their_experts_mean_are_collapsed():
    means = torch.randn(E, D)
    first = torch.arange(T) % E
    assert representation_collapse(means[first], decision(first.unsqueeze(1).tolist())) == pytest.approx(0, abs=1e-6)


def test_without_its_first_expert_a_token_is_answered_by_the_others_alone():
    moe, x = layer(D, E, k=3), torch.randn(T, D)
    routing = route(moe.router, x)
    gates, index = routing.choices.weights.detach(), routing.choices.indices
    slow = []
    for t in range(T):
        rest = gates[t, 1:] * gates[t].sum() / gates[t, 1:].sum()
        answers = moe.experts.all_outputs(x[t : t + 1])[0]
        slow.append(sum(g * answers[e] for g, e in zip(rest, index[t, 1:], strict=True)))
    whole = moe(x)
    with without_first({"": moe}):
        torch.testing.assert_close(moe(x), torch.stack(slow))
    assert torch.equal(moe(x), whole)


def test_redundancy_is_the_rise_of_the_loss_layer_by_layer():
    model = nn.Sequential(layer(D, E), MoE(TopK(D, E), Each([nn.Linear(D, D)] * E)))
    x = torch.randn(T, D)

    def loss():
        return model(x).square().mean().item()

    found = redundancy(model, loss)
    whole = loss()
    with without_first({"0": model[0]}):
        assert found["0"] == pytest.approx(loss() - whole)
    assert found["0"] != 0
    assert found["1"] == pytest.approx(0, abs=1e-6)  # all its experts are one


def test_a_model_without_sparse_layers_has_nothing_to_mask():
    with pytest.raises(ValueError, match="no sparse layer"):
        redundancy(nn.Linear(2, 2), lambda: 0.0)
