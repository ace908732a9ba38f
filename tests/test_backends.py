from dataclasses import replace

import pytest
import torch
from hypothesis import given

from moeify import Mixture, MoE, assign, backends
from moeify.backends import BACKENDS, Backend, compose
from moeify.experts import FFN, Identity
from moeify.routers import Capacity, TopK
from strategies import agree, choices, seeds


@pytest.mark.parametrize("name", ["gather", "compose", "auto"])
@given(choices(), seeds)
def test_every_backend_agrees_with_the_definition(name, choice, seed):
    torch.manual_seed(seed)
    index, gates, num_experts = choice
    experts = FFN(num_experts, 6, 3)
    x = torch.randn(len(index), 6, requires_grad=True)
    leaves = [x, gates, *experts.parameters()]
    y = backends.run(name, x, assign(*choice), experts)
    agree(y, leaves, compose(x, assign(*choice), experts), leaves)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cuda'; known are: auto, .*compose"):
        MoE(TopK(4, 2), FFN(2, 4, 3), backend="cuda")(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("reason", "layer", "mask"),
    [
        ("dropped", lambda: MoE(Capacity(TopK(4, 2), factor=0.25), FFN(2, 4, 3), backend="gather"), None),
        ("padding", lambda: MoE(TopK(4, 2), FFN(2, 4, 3), backend="gather"), torch.tensor([[1, 0, 1, 1]])),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(reason, layer, mask):
    moe = layer()
    moe.context.mask(mask)
    with pytest.raises(ValueError, match=f"'gather' cannot run this layer.*{reason}.*backend='auto'"):
        moe(torch.randn(1, 4, 4))


@pytest.mark.parametrize(
    ("reason", "routing"),
    [
        ("several gates", assign(torch.tensor([[0]]), torch.ones(1, 1, 2), 1)),
        ("gave a Mixture", Mixture(counts=torch.tensor([1]), into=torch.ones(1, 1), out_of=torch.ones(1, 1))),
        ("the same number of experts", replace(assign(torch.tensor([[0]]), torch.ones(1, 1), 1), choices=None)),
    ],
)
def test_gather_serves_one_weight_for_each_of_k_choices(reason, routing):
    with pytest.raises(ValueError, match=reason):
        backends.run("gather", torch.ones(1, 2), routing, Identity())
    assert backends.run("auto", torch.ones(1, 2), routing, Identity()).eq(1).all()


def test_auto_falls_back():
    moe = MoE(Capacity(TopK(4, 2), factor=0.25), FFN(2, 4, 3))
    assert moe(torch.randn(8, 4)).shape == (8, 4)


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("MOEIFY_CHECK", "1")


@pytest.mark.usefixtures("checked")
def test_a_wrong_backend_is_caught_when_checking(monkeypatch):
    wrong = Backend(lambda *args: compose(*args) + 0.1, lambda *call: None, lambda *call: True)
    monkeypatch.setitem(BACKENDS, "wrong", wrong)
    with pytest.raises(RuntimeError, match=r"'wrong' differs from the definition by 0\.1"):
        MoE(TopK(4, 2), Identity(2), backend="wrong")(torch.randn(3, 4))


@pytest.mark.usefixtures("checked")
def test_a_right_backend_with_dropout_passes_the_check():
    moe = MoE(TopK(8, 2), FFN(2, 8, 16, dropout=0.5), backend="gather")
    assert moe(torch.randn(9, 8)).isfinite().all()


@pytest.mark.parametrize("name", ["gather", "compose", "auto"])
def test_no_tokens_are_no_rows(name):
    assert MoE(TopK(8, 4), FFN(4, 8, 3), backend=name)(torch.empty(2, 0, 8)).shape == (2, 0, 8)
