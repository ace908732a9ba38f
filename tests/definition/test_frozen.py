"""SMoE-Dropout against its definition."""

import pytest
import torch

from moeify import MoE
from moeify.experts import FFN
from moeify.routers import Frozen
from strategies import agree, doubled

D, E, H = 6, 5, 4


def slow_layer(x, projection, own, k):
    out = torch.zeros_like(x)
    for t in range(len(x)):
        z = [projection[j] @ x[t] for j in range(E)]
        best = sorted(range(E), key=lambda j: -z[j].item())[:k]
        total = sum(torch.exp(z[j]) for j in best)
        for j in best:
            gate, up = (own["experts.gate_up_proj"][j] @ x[t]).chunk(2)
            expert_output = own["experts.down_proj"][j] @ (gate / (1 + torch.exp(-gate)) * up)
            out[t] = out[t] + torch.exp(z[j]) / total * expert_output
    return out


@pytest.mark.parametrize("k", [1, 3, E])
def test_a_random_projection_picks_and_weighs_the_experts(k):
    moe = MoE(Frozen(D, E, k=k), FFN(E, D, H))
    x = torch.randn(7, D, requires_grad=True)
    x64, own = x.detach().double().requires_grad_(), doubled(moe)
    slow = slow_layer(x64, moe.router.weight.double(), own, k)
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *own.values()])


def test_nothing_of_it_is_trained_and_all_of_it_is_saved():
    router = Frozen(D, E)
    assert not list(router.parameters())
    assert router.state_dict()["weight"].shape == (E, D)


def test_k_can_be_changed_at_any_time():
    moe = MoE(Frozen(D, E, k=1), FFN(E, D, H))
    x = torch.randn(3, D)
    for k in range(1, E + 1):
        moe.router.k = k
        torch.testing.assert_close(moe(x), slow_layer(x, moe.router.weight, dict(moe.named_parameters()), k))


def test_a_k_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="choose 1 <= k <= 5"):
        Frozen(D, E, k=6)
