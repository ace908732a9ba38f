import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moeify import MoE
from moeify.experts import FFN
from moeify.routers import Soft, TopK
from strategies import masks, route, seeds


@given(mask=masks(), slots=st.integers(1, 3), scale=st.floats(-30, 30), seed=seeds)
def test_columns_of_d_and_rows_of_c_sum_to_one(mask, slots, scale, seed):
    torch.manual_seed(seed)
    router = Soft(8, 4, slots=slots)
    torch.nn.init.constant_(router.scale, scale)
    routing = route(router, torch.randn(*mask.shape, 8), mask)
    lengths = mask.sum(1)
    assert routing.into.shape == (len(mask), lengths.max(), 4 * slots)
    torch.testing.assert_close(routing.into.sum(1), torch.ones(len(mask), 4 * slots))
    for c, n in zip(routing.out_of, lengths.tolist(), strict=True):
        torch.testing.assert_close(c[:n].sum(-1), torch.ones(n))


@given(mask=masks(), seed=seeds)
def test_padding_gives_nothing_and_gets_nothing(mask, seed):
    torch.manual_seed(seed)
    x = torch.randn(*mask.shape, 8, requires_grad=True)
    routing = route(Soft(8, 4), x, mask)
    y = routing.combine(routing.dispatch(x))
    assert y[~mask].count_nonzero() == 0
    assert y[mask].count_nonzero() == y[mask].numel()
    y.square().sum().backward()
    assert x.grad[~mask].count_nonzero() == 0


@pytest.mark.parametrize("width", [8, 64, 1024])
def test_logits_do_not_grow_with_the_width(width):
    router = Soft(width, 16)
    into = route(router, torch.randn(1, 50, width)).into
    assert into.max() < 4 / 50  # scale 1: nearly the mean of all tokens, whatever the width


def test_every_expert_has_as_many_slots_in_every_group():
    assert route(Soft(8, 4, slots=3), torch.randn(5, 7, 8)).counts.tolist() == [15] * 4


def test_every_token_reaches_every_expert_with_a_gradient():
    moe = MoE(Soft(8, 4), FFN(4, 8, 6))
    x = torch.randn(2, 5, 8, requires_grad=True)
    moe(x)[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()
    assert x.grad[1].count_nonzero() == 0
    assert (moe.experts.down_proj.grad.flatten(1).abs().sum(-1) > 0).all()


def test_an_expert_without_slots_is_refused():
    with pytest.raises(ValueError, match="0 slots reads no tokens"):
        Soft(8, 4, slots=0)


def choosing_operators(router, x):
    """The operators that sort real numbers or choose among them, in a sparse layer's forward and backward pass."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in {"sort", "argsort", "topk", "max", "argmax", "nonzero"} and args[0].is_floating_point():
                names.add(name)
            return function(*args, **(kwargs or {}))

    names: set[str] = set()
    layer = MoE(router, FFN(4, 8, 16))
    with Seen():
        layer(x).sum().backward()
    return names


def test_no_score_is_sorted_or_chosen_anywhere_in_the_graph():
    x = torch.randn(2, 6, 8)
    assert not choosing_operators(Soft(8, 4), x)
    assert choosing_operators(TopK(8, 4, k=2), x)
