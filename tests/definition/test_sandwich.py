"""The dense network behind a sparse layer (ST-MoE), and what a recipe makes of it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, load, save, sparsify
from moeify.experts import Glu, Plain
from moeify.find import DenseFFN, every
from moeify.flops import count
from moeify.sparsify import Plan, fresh, recipes, sandwich
from plain_models import output
from strategies import agree, doubled
from tiny_models import DENSE, causal_lm, inputs

D, H = 6, 10
SPARSE = Recipe(num_experts=4, experts=fresh)


def network(gated: bool, width_out: int = D) -> DenseFFN:
    maps = [nn.Linear(D, H) for _ in range(1 + gated)]
    activation = Glu(nn.functional.silu) if gated else Plain(torch.tanh)
    return DenseFFN(maps, nn.Linear(H, width_out), activation)


@pytest.mark.parametrize("gated", [True, False])
def test_a_further_network_adds_to_what_it_reads_after_a_norm(gated):
    layer, x = sandwich(network(gated), D), torch.randn(2, 3, D, requires_grad=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x64, own = x.detach().double().requires_grad_(), doubled(layer)
    slow = []
    for token in x64.reshape(-1, D):
        read = own["norm.weight"] * token / torch.sqrt((token**2).sum() / D + 1e-6)
        first = own["ffn.ups.0.weight"] @ read + own["ffn.ups.0.bias"]
        if gated:
            hidden = first / (1 + torch.exp(-first)) * (own["ffn.ups.1.weight"] @ read + own["ffn.ups.1.bias"])
        else:
            hidden = torch.tanh(first)
        slow.append(token + own["ffn.down.weight"] @ hidden + own["ffn.down.bias"])
    agree(layer(x), [x, *layer.parameters()], torch.stack(slow).view(2, 3, D), [x64, *own.values()])


def test_it_is_drawn_anew_as_experts_are():
    dense = network(True)
    before = dense.up_weight.clone()
    new = sandwich(dense, D, variance=0.1).ffn
    assert torch.equal(dense.up_weight, before)
    for matrix in (new.up_weight, new.down_weight):
        assert matrix.abs().max() <= 2 * (0.1 / matrix.shape[1]) ** 0.5 * 1.01
    assert not new.up_bias.any()


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "gpt2", "vit"])
def test_every_layer_with_a_sparse_one_is_followed(family):
    torch.manual_seed(0)
    plain = sparsify(DENSE[family](), SPARSE, verbose=False).eval()
    torch.manual_seed(0)
    model = sparsify(DENSE[family](), replace(SPARSE, after=sandwich), verbose=False).eval()
    sparse = [name for name, part in model.named_modules() if isinstance(part, MoE)]
    followed = {name.removesuffix(".after") for name, _ in model.named_modules() if name.endswith(".after")}
    assert len(followed) == len(sparse)
    assert all(any(name.startswith(f"{layer}.") for layer in followed) for name in sparse)
    assert count(model).flops > count(plain).flops
    given = {}
    for layer in followed:
        model.get_submodule(layer).register_forward_hook(lambda m, a, o, layer=layer: given.update({layer: o}))
        model.get_submodule(f"{layer}.after").register_forward_hook(lambda m, a, o, layer=layer: given.update({m: o}))
    output(model, inputs(model)).square().sum().backward()
    for layer in followed:
        after = model.get_submodule(f"{layer}.after")
        hidden = given[layer] if isinstance(given[layer], torch.Tensor) else given[layer][0]
        assert hidden is given[after]
        assert all(parameter.grad.any() for parameter in after.parameters())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_network_that_starts_at_zero_leaves_the_model_as_it_was(family):
    model = DENSE[family]().eval()
    before = output(model, inputs(model))
    recipe = Recipe(num_experts=4, after=partial(sandwich, zero=True))
    torch.testing.assert_close(
        output(sparsify(model, recipe, verbose=False), inputs(model)), before, rtol=1e-3, atol=1e-5
    )


def test_it_comes_back_from_disk(tmp_path):
    recipe = Recipe(where=every(2), num_experts=4, experts=fresh, after=partial(sandwich, variance=0.1))
    model = sparsify(causal_lm("llama"), recipe, verbose=False).eval()
    save(model, tmp_path)
    again = load(tmp_path)
    assert any(name.endswith("after.ffn.down.weight") for name in again.state_dict())
    assert torch.equal(output(again, inputs(model)), output(model, inputs(model)))


def test_the_recipe_of_st_moe_has_it():
    model = sparsify(DENSE["bert"](), recipes["stmoe"], verbose=False)
    assert sum(name.endswith(".after") for name, _ in model.named_modules()) == 1


def test_a_model_without_layers_has_nothing_to_follow_and_stays_as_it_was():
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    before = str(model)
    with pytest.raises(ValueError, match=r"stands in no numbered layer.*use after=nothing"):
        sparsify(model, replace(SPARSE, after=sandwich), verbose=False)
    assert str(model) == before


def test_a_refused_recipe_takes_it_away_again(monkeypatch):
    model = DENSE["llama"]()
    names = [name for name, _ in model.named_modules()]
    monkeypatch.setattr(Plan, "keeps_function", True)
    with pytest.raises(ValueError, match="should leave the model's outputs as they are"):
        sparsify(model, replace(SPARSE, after=sandwich), verbose=False)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(part._forward_hooks for part in model.modules())


def test_a_network_of_two_widths_cannot_add_to_what_it_reads():
    with pytest.raises(ValueError, match="outputs are as wide as its inputs is needed"):
        sandwich(network(False, width_out=D + 1), D)
