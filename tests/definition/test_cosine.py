"""X-MoE's cosine routing, one token and one expert at a time, in fp64."""

from math import exp

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import Cosine
from strategies import agree, doubled, route

T, D, E = 10, 6, 5


def norm(v):
    return torch.sqrt(sum(v_i * v_i for v_i in v))


def slow_cosine(x, p, k, normalize):
    u = p["projection"] @ x
    z = []
    for j in range(E):
        e = p["embedding"][j]
        z.append((u @ e) / (norm(u) * norm(e)) / torch.exp(p["log_temperature"][0]))
    total = sum(torch.exp(z_j) for z_j in z)
    s = [torch.exp(z_j) / total for z_j in z]
    chosen = sorted(range(E), key=lambda j: -s[j].item())[:k]
    kept = sum(s[j] for j in chosen) if normalize else 1
    return {j: s[j] / kept for j in chosen}


@pytest.mark.parametrize("options", [{}, {"k": 2, "normalize": True, "dimensions": 4}, {"k": 3, "temperature": 0.05}])
def test_cosine_routing_is_its_formula(options):
    router = Cosine(D, E, **options)
    nn.init.normal_(router.embedding, std=3.0)
    moe = MoE(router, Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    of_router = {name.removeprefix("router."): value for name, value in p.items()}
    slow = [
        sum(
            g * (p[f"experts.experts.{j}.weight"] @ x64[t])
            for j, g in slow_cosine(x64[t], of_router, router.k, router.normalize).items()
        )
        for t in range(T)
    ]
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()], rtol=1e-3)


def test_the_temperature_starts_where_it_was_told_and_has_half_as_many_dimensions_as_experts():
    router = Cosine(D, 32, temperature=0.07)
    assert exp(router.log_temperature.item()) == pytest.approx(0.07)
    assert router.projection.shape == (16, D)


def test_logits_are_bounded_by_the_inverse_temperature_whatever_the_size_of_tokens():
    router = Cosine(D, E, temperature=0.5)
    for size in (1e-3, 1.0, 1e3):
        assert route(router, size * torch.randn(50, D)).logits.abs().max() <= 2.0 + 1e-5
