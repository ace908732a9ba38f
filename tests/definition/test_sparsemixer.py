"""SparseMixer against Phi-3.5-MoE's own function, and against its formula."""

import pytest
import torch

from moeify.routers import SparseMixer
from strategies import gradients, route

D, E, T = 8, 6, 200


def confident(k=2, epsilon=0.01):
    router = SparseMixer(D, E, k=k, epsilon=epsilon)
    torch.nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_phi_3_5_moe_under_the_same_random_numbers(training, epsilon, monkeypatch):
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    router, x = confident(epsilon=epsilon).train(training), torch.randn(T, D)
    torch.manual_seed(1)
    ours = route(router, x)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)  # Phi draws the second threshold twice
    torch.manual_seed(1)
    gates, index = phimoe.sparsemixer(x @ router.weight.T, epsilon, training)
    assert torch.equal(ours.choices.indices, index)
    torch.testing.assert_close(ours.choices.weights, gates, rtol=2e-4, atol=0)  # Phi writes 1/3 as 0.3333
    torch.testing.assert_close(gradients(ours.choices.weights, [router.weight]), gradients(gates, [router.weight]))


def test_the_gradient_is_that_of_the_probability_whatever_the_weight_is():
    router, x = confident(k=1, epsilon=1e6), torch.randn(T, D)
    decision = route(router, x)
    p = (x @ router.weight.T).softmax(-1)
    chosen = p.gather(-1, decision.choices.indices)
    ratio = decision.choices.weights / chosen
    torch.testing.assert_close(ratio, torch.where(ratio > 0.5, 1.0, 1 / 3))
    torch.testing.assert_close(gradients(decision.choices.weights, [router.weight]), gradients(chosen, [router.weight]))


def test_experts_are_drawn_by_their_probability():
    router = confident(k=1, epsilon=1e6)
    decision = route(router, torch.randn(D).expand(100000, D))
    torch.testing.assert_close(decision.counts / 100000, decision.scores[0], atol=0.015, rtol=0)
    not_best = decision.choices.indices[:, 0] != decision.scores[0].argmax()
    kept_whole = (decision.choices.weights[:, 0] / decision.scores[0, decision.choices.indices[:, 0]] > 0.5)[not_best]
    assert kept_whole.float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_evaluation_is_deterministic_and_takes_the_best():
    router, x = confident().eval(), torch.randn(T, D)
    first, second = route(router, x), route(router, x)
    assert torch.equal(first.choices.weights, second.choices.weights)
    assert torch.equal(first.choices.indices, first.logits.topk(2).indices)


def test_no_token_draws_an_expert_twice():
    index = route(confident(k=4, epsilon=1e6), torch.randn(T, D)).choices.indices
    assert all(len(set(row)) == 4 for row in index.tolist())
