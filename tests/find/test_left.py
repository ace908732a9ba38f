"""Which of the networks in a layer become sparse, which stay dense and why, and learnable activations."""

import io
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn

from moeify import Recipe, merge_models, sparsify
from moeify.find import chosen, every, ffn, last, named
from moeify.find.shapes import recognise
from moeify.find.where import candidates
from moeify.inspect import weight_cosine
from moeify.sparsify import copies, fresh, frozen, lora_ffn, splits
from moeify.sparsify.convert import convert
from moeify.store import load, save
from plain_models import Block, Gated, Strange, blocks, sparse_layers
from tiny_models import SPARSE, causal_lm, widened

COPIES = Recipe(num_experts=4)
X = torch.randn(2, 5, 8)


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(8, 12), nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x, residual):
        return self.norm(self.dense(x) + residual)


class TwoStreams(nn.Module):
    """A layer with a network for each of two streams, as LXMERT and BLIP-2 have them."""

    def __init__(self):
        super().__init__()
        self.words, self.words_out = Up(), Down()
        self.image, self.image_out = Up(), Down()

    def forward(self, x):
        x = self.words_out(self.words(x), x)
        return self.image_out(self.image(x), x)


class Positions(nn.Module):
    """A layer with a small network that reads coordinates, as Swin-V2 has it."""

    def __init__(self):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(8), Gated()
        self.positions = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        return x + self.ffn(self.norm(x)) + self.positions(torch.ones(2)).sum()


def names(model, where=ffn):
    return [site.name for site in where(model)]


def test_every_network_of_a_layer_is_found():
    assert names(nn.Sequential(TwoStreams())) == ["0.words", "0.image"]
    model = widened(nn.Sequential(TwoStreams(), TwoStreams()))
    before = model(X)
    sparsify(model, COPIES, verbose=False)
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-4)


def test_a_low_rank_adapter_is_no_network():
    class Adapted(Gated):
        def __init__(self):
            super().__init__()
            self.adapter = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
            self.act = nn.SiLU()

        def forward(self, x):
            return super().forward(x + self.adapter(x))

    with pytest.raises(ValueError, match=r"0\.ffn \(Adapted\) has the linear maps .*where=modules\(r'0\\\.ffn\$'\)"):
        ffn(nn.Sequential(Block(Adapted())))


def test_what_stays_dense_is_told_with_its_reason():
    model = nn.Sequential(Positions(), Positions(), Block(nn.Sequential(Strange(), Gated())))
    model.add_module("head", nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    report = convert(model, Recipe(num_experts=4, where=every(2)))
    assert report.left == {
        "0.ffn": "where=... does not choose it",
        "0.positions.0": "its width, 2, is not that of the layer's tokens",
        "1.positions.0": "its width, 2, is not that of the layer's tokens",
        "2.ffn.0": "it does not compute down(act(up(x))) or down(act(gate(x)) · up(x))",
        "2.ffn.1": "where=... does not choose it",
        "head.0": "it is in no numbered layer",
    }
    report.show(Console(file=(out := io.StringIO()), width=120))
    assert "left dense" in out.getvalue()
    assert "0.positions.0" in out.getvalue()


def test_the_experts_of_a_mixture_are_not_what_stays_dense():
    assert convert(SPARSE["deepseek_v3"](), COPIES).left == {}


@pytest.mark.parametrize("where", [named(r"^1\."), chosen(lambda name, dense: name.startswith("1"))])
def test_named_and_chosen_leave_out_what_cannot_be_read(where):
    model = nn.Sequential(Block(Strange()), *blocks(1))
    with pytest.raises(ValueError, match="leave it out with where=named"):
        ffn(model)
    assert names(model, where) == ["1.ffn"]
    with pytest.raises(ValueError, match=r"0\.ffn \(Strange\)"):
        named(r"^0\.")(model)


class Learning(nn.Module):
    """A feed-forward network in a module of its own, whose activation has a parameter (Apertus)."""

    def __init__(self, slope: float = 0.3):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(12, 8), nn.PReLU(init=slope)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Loose(Learning):
    """The same as parts that a layer calls (DAB-DETR)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + super().forward(x))


SHAPES = {
    "a module of its own": lambda: Block(Learning()),
    "loose": Loose,
    "sequential": lambda: Block(nn.Sequential(nn.Linear(8, 12), nn.PReLU(init=0.3), nn.Linear(12, 8))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_share_what_their_activation_learns(shape, tmp_path):
    def build():
        return nn.Sequential(SHAPES[shape](), SHAPES[shape]())

    model = widened(build())
    for part in model.modules():
        if isinstance(part, nn.PReLU):
            nn.init.constant_(part.weight, 0.6)
    before = model(X)
    sparsify(model, COPIES, verbose=False)
    model(X).square().sum().backward()
    slopes = {name: p for name, p in model.named_parameters() if name.endswith("act.weight")}
    assert len(slopes) == 2
    assert all(p.grad is not None and p.item() == pytest.approx(0.6) for p in slopes.values())
    save(model, tmp_path)
    for one in (model, load(tmp_path, build())):
        torch.testing.assert_close(one(X), before, rtol=1e-4, atol=1e-4)
    assert torch.allclose(weight_cosine(next(iter(sparse_layers(model).values())).experts), torch.ones(4, 4))


@pytest.mark.parametrize("experts", [splits, fresh, partial(copies, drop=0.5), partial(copies, noise=0.1)])
def test_every_kind_of_experts_has_an_activation_that_learns(experts):
    model = sparsify(nn.Sequential(Block(Learning())), Recipe(num_experts=4, experts=experts), verbose=False)
    model(X).sum().backward()
    assert dict(model.named_parameters())["0.ffn.experts.act.weight"].grad is not None


def test_low_rank_experts_freeze_an_activation_that_learns():
    recipe = Recipe(num_experts=2, experts=lora_ffn)
    model = sparsify(nn.Sequential(Block(Learning())), recipe, verbose=False)
    assert not dict(model.named_parameters())["0.ffn.experts.act.weight"].requires_grad


def test_a_frozen_network_beside_experts_keeps_an_activation_of_its_own():
    recipe = Recipe(num_experts=2, experts=partial(fresh, zero=True), shared=frozen)
    model = sparsify(nn.Sequential(Block(Learning())), recipe, verbose=False)
    learns = {name: p.requires_grad for name, p in model.named_parameters() if name.endswith("act.weight")}
    assert learns == {"0.ffn.experts.act.weight": True, "0.ffn.shared.act.weight": False}


def test_merged_models_share_the_mean_of_what_their_activations_learn():
    model = merge_models([nn.Sequential(Block(Learning(slope))) for slope in (0.2, 0.4)], verbose=False)
    assert dict(model.named_parameters())["0.ffn.experts.act.weight"].item() == pytest.approx(0.3)


def test_a_model_is_searched_once_for_what_becomes_sparse_and_what_stays_dense(monkeypatch):
    searched = []
    monkeypatch.setattr("moeify.find.once.recognise", lambda model: searched.append(model) or recognise(model))
    model = causal_lm("llama")
    report = convert(model, Recipe(num_experts=2, where=last(1)))
    assert searched == [model]
    assert len(report.left) == 1
    candidates(causal_lm("llama"))
    assert len(searched) == 2
