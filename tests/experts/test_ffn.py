import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moeify.experts import FFN, ClampedGlu, Glu, Plain
from strategies import seeds


@pytest.mark.parametrize(
    ("activation", "bias", "shapes"),
    [
        (Glu(F.silu), False, {"gate_up_proj": (4, 6, 5), "down_proj": (4, 5, 3)}),
        (Plain(F.gelu), False, {"up_proj": (4, 3, 5), "down_proj": (4, 5, 3)}),
        (
            ClampedGlu(),
            True,
            {"gate_up_proj": (4, 6, 5), "gate_up_proj_bias": (4, 6), "down_proj": (4, 5, 3), "down_proj_bias": (4, 5)},
        ),
    ],
)
def test_parameters_are_named_and_stacked_as_transformers_stacks_them(activation, bias, shapes):
    experts = FFN(4, 5, 3, activation=activation, bias=bias)
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == shapes


def test_up_and_down_are_the_parameters_whatever_their_names():
    plain, gated = FFN(4, 5, 3, activation=Plain(F.relu), bias=True), FFN(4, 5, 3)
    assert plain.up[0] is plain.up_proj
    assert plain.up[1] is plain.up_proj_bias
    assert gated.up[0] is gated.gate_up_proj
    assert gated.up[1] is gated.down[1] is None


@given(st.permutations(range(4)), seeds)
def test_experts_may_be_renumbered(order, seed):
    torch.manual_seed(seed)
    experts, renumbered = FFN(4, 5, 3), FFN(4, 5, 3)
    for p, q in zip(experts.parameters(), renumbered.parameters(), strict=True):
        q.data.copy_(p.data[order])
    parts = [torch.randn(n, 5) for n in (2, 0, 3, 1)]
    moved = [parts[e] for e in order]
    y = experts(torch.cat(parts), torch.tensor([2, 0, 3, 1])).split([2, 0, 3, 1])
    z = renumbered(torch.cat(moved), torch.tensor([len(part) for part in moved]))
    torch.testing.assert_close(z, torch.cat([y[e] for e in order]))


def test_an_expert_starts_as_a_linear_map_of_torch_does():
    weight = FFN(2, 100, 50).gate_up_proj
    assert weight.abs().max().item() == pytest.approx(0.1, rel=0.01)


def test_nobody_may_be_asked():
    assert FFN(3, 5, 4, bias=True)(torch.empty(0, 5), torch.zeros(3, dtype=torch.int64)).shape == (0, 5)


def test_experts_say_their_sizes():
    assert "experts=3, 5 -> 4 -> 2" in repr(FFN(3, 5, 4, width_out=2))
