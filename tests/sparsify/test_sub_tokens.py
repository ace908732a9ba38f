"""MH-MoE by its recipe: sub-tokens are routed, padding is not, and what is saved is what is loaded."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from moeify import record, sparsify
from moeify.experts import FFN
from moeify.find import linears, sub_tokens
from moeify.flops import count
from moeify.inspect import check_causality
from moeify.layers import sparse_layers
from moeify.multihead import MultiHead
from moeify.routers import TopK
from moeify.sparsify import Recipe, copies, find, fresh, recipes, splits
from moeify.store import load, save
from tiny_models import DENSE, causal_lm, inputs

ON_PARTS = Recipe(where=sub_tokens(4), num_experts=4, router=TopK, experts=fresh)


def made(model, recipe=ON_PARTS):
    torch.manual_seed(0)
    return sparsify(model, recipe, verbose=False)


def test_padding_is_not_routed():
    model = made(causal_lm("llama"))
    ids, mask = torch.randint(3, 256, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 3:] = 0
    with record(model) as decisions:
        model(input_ids=ids, attention_mask=mask)
    assert [d.counts.sum().item() for d in decisions.values()] == [11 * 4 * 2] * 2  # 88 of 128


@pytest.mark.parametrize("family", ["llama", "vit", "gpt2"])
@pytest.mark.parametrize("recipe", [recipes["mhmoe"], ON_PARTS], ids=["mhmoe", "sub-tokens"])
def test_a_model_is_what_it_was_after_saving_and_loading(family, recipe, tmp_path):
    model = made(DENSE[family](), recipe).eval()
    heads = [module for module in model.modules() if isinstance(module, MultiHead)]
    assert len(heads) == (1 if recipe is recipes["mhmoe"] else 2)
    assert all(head.moe.experts.width == 8 for head in heads)
    given = inputs(model)
    expected = model(**given)[0]
    save(model, tmp_path)
    again = load(tmp_path).eval()
    assert torch.equal(again(**given)[0], expected)
    assert count(again) == count(model)


def test_experts_have_the_hidden_units_of_the_network_and_the_width_of_a_part():
    model = made(DENSE["gpt2"]())
    experts = next(iter(sparse_layers(model).values())).experts
    assert isinstance(experts, FFN)
    assert (experts.width, experts.hidden, experts.width_out) == (8, 128, 8)
    assert experts.up[1].shape == (4, 128)


def test_every_parameter_of_a_layer_learns():
    model = made(causal_lm("llama"))
    model(**inputs(model)).loss.backward()
    layer = model.model.layers[0].mlp
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_its_decoder_is_causal_without_a_limit():
    dense = recipes["mhmoe"]
    unlimited = partial(dense.decoder_router, factor=float("inf"), eval_factor=float("inf"))
    model = made(causal_lm("llama"), replace(dense, decoder_router=unlimited))
    assert all(check_causality(model, inputs(model, 1, 4)).values())


def test_what_keeps_the_function_of_whole_tokens_is_refused():
    for experts in (copies, splits):
        with pytest.raises(ValueError, match="sub-tokens read parts of one; train new experts"):
            made(causal_lm("llama"), replace(ON_PARTS, experts=experts))


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="width 32, which cannot be cut into 5 heads"):
        made(causal_lm("llama"), replace(ON_PARTS, where=sub_tokens(5)))
    with pytest.raises(ValueError, match="not a feed-forward network with outputs as wide"):
        made(causal_lm("llama"), replace(ON_PARTS, where=sub_tokens(4, where=linears("q_proj"))))


def test_a_recipe_of_sub_tokens_is_read_as_it_was_written():
    written = ON_PARTS.to_dict()
    assert written["where"] == {"name": "sub_tokens", "heads": 4, "where": "ffn"}
    assert Recipe.from_dict(written).to_dict() == written


@pytest.mark.parametrize("heads", [0, 3, "four"])
def test_a_damaged_number_of_heads_is_named(heads):
    model = causal_lm("llama")
    described = find(model, ON_PARTS).describe()
    described[0]["heads"] = heads
    with pytest.raises(ValueError, match="which cannot be cut into"):
        find(model, ON_PARTS, described)
