"""Noisy top-k against Shazeer's and V-MoE's formulas, one token and one expert at a time, in fp64."""

from math import sqrt

import pytest
import torch
from torch import nn

from moeify import MoE, losses
from moeify.experts import Each
from moeify.routers import NoisyTopK
from moeify.routers.noisy import of_all, of_others
from strategies import agree, doubled, route

T, D, E = 12, 6, 5

SETTINGS = {
    "shazeer": {"k": 3},
    "shazeer, every expert": {"k": E},
    "v-moe": {"k": 2, "noise": 1 / E, "order": "softmax"},
    "v-moe, one expert": {"k": 1, "noise": 1 / E, "order": "softmax"},
}


def sharp(**options):
    router = NoisyTopK(D, E, **options)
    for weight in router.parameters():
        nn.init.normal_(weight)
    return router


def slow_noisy(x, p, noise, epsilon):
    """H(x)_j for every expert."""
    h = []
    for j in range(E):
        spread = torch.log(1 + torch.exp(p["noise_weight"][j] @ x)) if noise == "learned" else noise
        h.append(p["weight"][j] @ x + epsilon[j] * spread)
    return h


def slow_gates(h, k, order):
    chosen = sorted(range(E), key=lambda j: -h[j].item())[:k]
    total = sum(torch.exp(h[j]) for j in (chosen if order == "select" else range(E)))
    return {j: torch.exp(h[j]) / total for j in chosen}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_noisy_top_k_is_its_formula(name, training):
    router = sharp(**SETTINGS[name]).train(training)
    moe = MoE(router, Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    x = torch.randn(T, D, requires_grad=True)
    torch.manual_seed(3)
    y = moe(x)
    torch.manual_seed(3)
    epsilon = torch.randn(T, E).double() * training

    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    of_router = {name.removeprefix("router."): value for name, value in p.items()}
    slow = []
    for t in range(T):
        h = slow_noisy(x64[t], of_router, router.noise, epsilon[t])
        gates = slow_gates(h, router.k, router.order)
        slow.append(sum(g * (p[f"experts.experts.{j}.weight"] @ x64[t]) for j, g in gates.items()))
    agree(y, [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def normal(v):
    """Φ(v)."""
    return 0.5 * (1 + torch.erf(v / sqrt(2)))


@pytest.mark.parametrize("noise", ["learned", 0.5])
def test_the_load_loss_is_shazeers_appendix_a(noise):
    router = sharp(k=2, noise=noise)
    x = torch.randn(T, D)
    torch.manual_seed(3)
    routing = route(router, x)
    torch.manual_seed(3)
    epsilon = torch.randn(T, E).double()

    p = doubled(router)
    load = [0.0] * E
    for t in range(T):
        token = x[t].double()
        h = slow_noisy(token, p, noise, epsilon[t])
        for j in range(E):
            kth_excluding = sorted((h[i] for i in range(E) if i != j), key=lambda v: -v.item())[2 - 1]
            spread = torch.log(1 + torch.exp(p["noise_weight"][j] @ token)) if noise == "learned" else noise
            load[j] = load[j] + normal((p["weight"][j] @ token - kth_excluding) / spread)
    torch.testing.assert_close(routing.evidence.expected_load.double(), torch.stack(load), rtol=1e-4, atol=1e-5)
    mean = sum(load) / E
    slow = sum((v - mean) ** 2 for v in load) / E / mean**2
    agree(losses.load_loss(routing), list(router.parameters()), slow, list(p.values()))


def test_the_expected_load_is_how_often_another_draw_of_ones_own_noise_wins():
    clean, k, draws = torch.randn(3, E), 2, 20000
    spread = torch.rand(3, E) + 0.3
    noisy = clean + torch.randn(3, E) * spread
    expected = of_others(clean, noisy, spread, k)
    for j in range(E):
        again = noisy.expand(draws, 3, E).clone()
        again[..., j] = clean[:, j] + torch.randn(draws, 3) * spread[:, j]
        frequency = (again.topk(k, dim=-1).indices == j).any(-1).float().mean(0).sum()
        assert frequency.item() == pytest.approx(expected[j].item(), abs=0.02)


def test_initially_noise_alone_decides():
    routing = route(NoisyTopK(D, E, k=2), torch.randn(4000, D))
    assert routing.logits.count_nonzero() == 0
    assert (routing.counts / 8000 - 1 / E).abs().max() < 0.02


def test_v_moes_expected_load_compares_with_the_kth_of_all():
    router = sharp(k=2, noise="1/E", order="softmax", expected_load=of_all)
    x = torch.randn(T, D)
    torch.manual_seed(3)
    routing = route(router, x)
    torch.manual_seed(3)
    epsilon = torch.randn(T, E).double()

    p, load = doubled(router), [0.0] * E
    for t in range(T):
        h = slow_noisy(x[t].double(), p, 1 / E, epsilon[t])
        threshold = sorted(h, key=lambda v: -v.item())[2 - 1]
        for j in range(E):
            load[j] = load[j] + normal((p["weight"][j] @ x[t].double() - threshold) / (1 / E))
    mean = sum(load) / E
    slow = sum((v - mean) ** 2 for v in load) / E / mean**2
    agree(losses.load_loss(routing), list(router.parameters()), slow, list(p.values()))


@pytest.mark.parametrize("experts", [4, 8, 32])
def test_v_moes_noise_shrinks_with_the_number_of_experts(experts):
    assert NoisyTopK(D, experts, noise="1/E").noise == 1 / experts
