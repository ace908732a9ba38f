"""Models, paths and recipes that were mixed up are refused by name, before anything is read, made or changed."""

from functools import partial
from pathlib import Path

import pytest
from torch import nn

from moeify import Recipe, from_adapters, load, load_adapters, merge_models, record, save, save_adapters, sparsify
from moeify.compress import quantize_experts
from moeify.export import supports, write
from moeify.flops import count
from moeify.given import named
from moeify.inspect import diagnose
from moeify.routers import TopK
from moeify.serve import fast_decode, plain_decode
from tiny_models import TINY

llama = TINY["llama"]

OF_A_MODEL = {
    "sparsify": partial(sparsify, recipe=Recipe()),
    "from_adapters": partial(from_adapters, adapters={}, router=TopK),
    "load_adapters": partial(load_adapters, folder="folder"),
    "save": partial(save, folder="folder"),
    "save_adapters": partial(save_adapters, folder="folder"),
    "record": lambda model: record(model).__enter__(),
    "quantize_experts": quantize_experts,
    "fast_decode": fast_decode,
    "plain_decode": plain_decode,
    "count": count,
    "diagnose": diagnose,
    "supports": supports,
    "write": partial(write, folder="folder"),
}


@pytest.mark.parametrize("call", OF_A_MODEL.values(), ids=OF_A_MODEL)
@pytest.mark.parametrize("given", ["folder", Path("folder"), None, {}, [], nn.Linear], ids=str)
def test_what_is_no_model_is_refused_by_name(call, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"expected a model, an nn\.Module, but got ") as refused:
        call(given)
    assert named(given) in str(refused.value)
    assert ("moeify.load('folder')" in str(refused.value)) == (str(given) == "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [nn.Linear(2, 2), None, b"folder", ["folder"], 3], ids=str)
def test_what_is_no_path_is_refused_by_name(given):
    for call in (load, partial(save, nn.Linear(2, 2)), partial(write, nn.Linear(2, 2))):
        with pytest.raises(TypeError, match="expected a path, a str or a Path, but got "):
            call(given)


@pytest.mark.parametrize("given", ["mixtral", Path("recipe.json"), {"num_experts": 2}, None, 8, Recipe], ids=str)
def test_what_is_no_recipe_is_refused_with_the_way_to_one(given):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=r"expected a Recipe, but got .*(read_recipe|from_dict|Recipe\()"):
        sparsify(model, given)
    assert model.state_dict().keys() == before.keys()
    if given is not None:
        with pytest.raises(TypeError, match="expected a Recipe, but got"):
            merge_models([llama(), llama()], given)


@pytest.mark.parametrize("field", ["where", "router", "decoder_router", "experts", "shared", "memory", "after"])
@pytest.mark.parametrize("given", ["topk", 2, True, [], nn.Linear(2, 2)], ids=str)
def test_a_part_of_a_recipe_that_makes_nothing_is_refused(field, given):
    with pytest.raises(TypeError, match=f"expected a function or a class as {field} of a recipe, but got"):
        Recipe(**{field: given})


@pytest.mark.parametrize("found", [True, None, ["model.layers.0.mlp"]], ids=str)
def test_sites_that_are_none_are_refused(found):
    with pytest.raises(TypeError, match=r"where of a recipe returns a list of sites.*chosen\("):
        sparsify(llama(), Recipe(where=lambda model: found))
    with pytest.raises(ValueError, match="nothing to make sparse in this LlamaForCausalLM"):
        sparsify(llama(), Recipe(where=lambda model: []))


def test_one_model_alone_or_something_else_among_several_is_refused_by_merge_models():
    for one in ("folder", Path("folder"), llama()):
        with pytest.raises(TypeError, match=r"expected several models, .* but got .* alone"):
            merge_models(one)
    for other in (None, 3, llama().config, llama().state_dict(), nn.Linear):
        for models in ([llama(), other], [other, llama()]):
            with pytest.raises(TypeError, match="expected a model or the path of one, but got"):
                merge_models(models, verbose=False)


def test_models_and_paths_are_merged_in_any_order(tmp_path):
    one, other = llama(), llama()
    one.save_pretrained(tmp_path)
    weights = [model.model.layers[0].mlp.down_proj.weight for model in (one, other)]
    for order, models in (((0, 1), [tmp_path, other]), ((1, 0), [other, str(tmp_path)])):
        experts = merge_models(models, verbose=False).model.layers[0].mlp.experts
        assert [bool((experts.down_proj[e] == weights[i]).all()) for e, i in enumerate(order)] == [True, True]
