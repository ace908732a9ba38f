"""Expert-router coupling against its double sum."""

import pytest
import torch
from torch import nn

from moeify import losses
from moeify.experts import FFN, ClampedGlu, Glu, Plain
from strategies import agree

E, D, H = 5, 6, 3

GATES = {
    "swiglu": (Glu(nn.functional.silu), lambda w: w[:H]),
    "plain": (Plain(nn.functional.gelu), lambda w: w),
    "clamped": (ClampedGlu(), lambda w: w[::2]),
}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("activation", GATES)
def test_erc_is_the_double_sum_over_router_rows_and_experts(activation, alpha):
    kind, gate = GATES[activation]
    experts = FFN(E, D, H, activation=kind)
    rows = torch.randn(E, D, requires_grad=True)
    up = experts.up[0]
    rows64, up64 = (t.detach().double().requires_grad_() for t in (rows, up))
    m = [[(gate(up64[j]) @ rows64[i]).norm() for j in range(E)] for i in range(E)]
    slow = 0.0
    for i in range(E):
        for j in range(E):
            if i != j:
                slow = slow + (m[i][j] - alpha * m[i][i]).clamp_min(0) + (m[j][i] - alpha * m[i][i]).clamp_min(0)
    agree(losses.erc(rows, experts, alpha), [rows, up], slow / E**2, [rows64, up64])


def test_experts_that_hear_their_own_row_alone_lose_nothing():
    experts = FFN(E, E, 1, activation=Plain(nn.functional.relu))
    experts.up[0].data.copy_(torch.eye(E).unsqueeze(1))
    assert losses.erc(torch.eye(E), experts) == 0


def test_a_proxy_stays_within_half_the_way_to_the_nearest_row():
    weight = torch.randn(E, D, requires_grad=True)
    near = [min((weight[i] - weight[j]).norm() for j in range(E) if j != i) for i in range(E)]
    drawn = torch.stack([losses.proxies(weight) / weight - 1 for _ in range(300)])
    for i in range(E):
        epsilon = (near[i] / (2 * weight[i].norm())).item()
        assert drawn[:, i].abs().max().item() == pytest.approx(epsilon, rel=0.02)
        assert drawn[:, i].abs().max() <= epsilon * 1.0001


def test_the_noise_of_a_proxy_has_no_gradient():
    weight = torch.randn(E, D, requires_grad=True)
    torch.manual_seed(1)
    proxy = losses.proxies(weight)
    (gradient,) = torch.autograd.grad(proxy.sum(), weight)
    torch.testing.assert_close(gradient, (proxy / weight).detach())
