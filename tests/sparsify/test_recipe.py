"""Recipes as files: what is written is read back, and what cannot be read is answered with what can."""

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.catalogue import USES, catalogue, name_of, search
from moeify.find import every, ffn, last, modules, named, odd
from moeify.routers import ExpertGroups, TopK, sigmoid, softmax, sqrt_softplus
from moeify.sparsify import (
    Recipe,
    copies,
    dense,
    fresh,
    frozen,
    gated,
    nothing,
    read_recipe,
    recipes,
    sparsify,
    splits,
)
from moeify.sparsify.split import clustered, importance, random
from moeify.store import load, save
from nights import one_of_each
from plain_models import output, sparse_layers, told
from tiny_models import DENSE, causal_lm, inputs

FOR_ENCODERS = {"limoe", "base", "sbase", "vmoe", "mobile_vmoe", "soft"}

any_recipe = st.builds(
    Recipe,
    where=st.sampled_from([ffn, odd, every(3), last(2), named(r"\.1\."), modules("mlp$")]),
    num_experts=st.integers(1, 64),
    router=st.builds(
        partial,
        st.just(TopK),
        k=st.integers(1, 8),
        score=st.sampled_from([softmax, sigmoid, sqrt_softplus]),
        expert_groups=st.sampled_from([None, ExpertGroups(4, 2), ExpertGroups(8, 1, reduce="top2", fill=0.0)]),
        scale=st.floats(0.5, 2.5),
    ),
    experts=st.sampled_from(
        [copies, partial(copies, noise=0.1), partial(fresh, granularity=4, zero=True), splits]
        + [partial(splits, split=split) for split in (random, clustered, importance)]
    ),
    shared=st.sampled_from([nothing, dense, frozen, gated]),
)


@given(recipe=any_recipe)
def test_a_recipe_survives_json(recipe):
    written = recipe.to_dict()
    assert Recipe.from_dict(json.loads(json.dumps(written))).to_dict() == written


@pytest.mark.parametrize("name", recipes)
def test_the_list_of_recipes_says_what_they_are(name):
    entry = catalogue()[name]
    assert entry.num_experts == recipes[name].num_experts
    in_decoders = recipes[name].decoder_router or recipes[name].router
    assert entry.causal is in_decoders(8, entry.num_experts).causal
    assert entry.use in USES
    assert entry.source
    for text, columns in ((entry.title, 20), (entry.line, 60), *((line, 76) for line in entry.formula)):
        assert text.isascii()
        assert 0 < len(text) <= columns
    assert Path(__file__).parents[2].joinpath("docs", "methods", f"{entry.page}.md").is_file()


def test_the_spellings_of_papers_and_people_find_a_recipe():
    for spelling in ("vmoe", "v-moe", "V-MoE", "VMoE", "v_moe", " V MoE "):
        assert name_of(spelling) == "vmoe"
        assert read_recipe(spelling) is recipes["vmoe"]
    spelled = {"MoE++": "moepp", "DeepSeek-V3": "deepseek", "deepseek-v2": "deepseek_v2", "top-p": "topp"}
    assert {spelling: name_of(spelling) for spelling in spelled} == spelled
    assert name_of("moe") is None
    assert search("2106.05974") == ["vmoe"]
    assert search("sinkhorn") == ["sbase"]
    assert search("Mixtral") == ["matched", "mixtral"]
    assert search("nonsense") == []


def test_no_two_recipes_have_one_spelling():
    assert [name_of(entry.title) for entry in catalogue().values()] == list(catalogue())


def test_listing_recipes_makes_none():
    program = "import sys; from moeify.catalogue import catalogue; before = set(sys.modules); catalogue(); " + (
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith(('torch', 'moeify'))))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("name", recipes)
@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_named_recipe_survives_a_file(name, suffix, tmp_path):
    path = tmp_path / f"recipe.{suffix}"
    written = recipes[name].to_dict()
    path.write_text(json.dumps(written) if suffix == "json" else toml(written))
    assert read_recipe(path).to_dict() == written
    assert read_recipe(name) is recipes[name]


def toml(values: dict) -> str:
    def inline(value):
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {inline(part)}" for key, part in value.items()) + "}"
        return str(value) if value in (math.inf, -math.inf) else json.dumps(value)

    return "\n".join(f"{key} = {inline(value)}" for key, value in values.items())


@pytest.mark.parametrize("name", one_of_each(recipes))
def test_a_named_recipe_makes_a_model_that_learns_the_same_after_its_file(name):
    recipe = Recipe.from_dict(json.loads(json.dumps(recipes[name].to_dict())))
    states = []
    for each in (recipes[name], recipe):
        torch.manual_seed(0)
        model = sparsify(DENSE["bert" if name in FOR_ENCODERS else "llama"]().train(), each, verbose=False)
        for parameter in (p for key, p in model.named_parameters() if key.endswith("lora_B")):
            torch.nn.init.normal_(parameter)  # adapters start as nothing, and from nothing no router learns
        with told(model, 2):
            output(model, inputs(model)).square().sum().backward()
        for layer in sparse_layers(model).values():
            assert all(parameter.grad.any() for parameter in layer.router.parameters())
        states.append(model.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("name", sorted(FOR_ENCODERS))
def test_a_recipe_that_looks_at_later_tokens_is_refused_by_decoders(name):
    assert not recipes[name].router(8, recipes[name].num_experts).causal
    with pytest.raises(ValueError, match=r"is in a decoder, .* looking at later tokens"):
        sparsify(causal_lm("llama"), recipes[name], verbose=False)
    assert sparse_layers(sparsify(causal_lm("llama"), recipes[name], verbose=False, allow_noncausal=True))


@pytest.mark.parametrize("name", one_of_each(sorted(recipes.keys() - FOR_ENCODERS)))
def test_the_other_recipes_look_at_no_later_token(name):
    torch.manual_seed(0)
    model = sparsify(causal_lm("llama"), recipes[name], verbose=False)
    ids = torch.randint(3, 200, (1, 12))
    other = torch.cat([ids[:, :6], torch.randint(3, 200, (1, 6))], dim=1)
    with told(model, 1):
        torch.testing.assert_close(model(ids).logits[:, :6], model(other).logits[:, :6], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, recipe in recipes.items() if recipe.decoder_router is not None])
def test_an_encoder_decoder_has_the_routers_of_both_sides(name, tmp_path):
    model = sparsify(DENSE["t5"](num_layers=4, num_decoder_layers=4), recipes[name], verbose=False)
    sides = sparse_layers(model.encoder), sparse_layers(model.decoder)
    encoder, decoder = ([layer.router for layer in side.values()] for side in sides)
    assert {router.causal for router in encoder} == {False}
    assert {router.causal for router in decoder} == {True}
    model(**inputs(model)).logits.square().mean().backward()
    assert all(weight.grad is not None for router in encoder + decoder for weight in router.parameters())
    save(model.eval(), tmp_path)
    assert torch.equal(load(tmp_path)(**inputs(model)).logits, model(**inputs(model)).logits)


def test_a_file_may_leave_out_what_stays_as_it_is():
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"num_experts": 4, "router": "topk"}) == Recipe(num_experts=4)


def nested(times: int) -> dict:
    router = {"name": "topk"}
    for _ in range(times):
        router = {"name": "capacity", "router": router}
    return router


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"experts_number": 4}, "no field 'experts_number'; did you mean "),
        ({"routers": "topk"}, "no field 'routers'; did you mean 'router'"),
        ({"colour": "red"}, "no field 'colour'; known are: where, num_experts, router, decoder_router, experts"),
        ({"experts": "copy"}, "no experts is called 'copy'; did you mean 'copies'"),
        ({"router": {"name": "topk", "kk": 2}}, "router 'topk' has no option 'kk'; did you mean 'k'"),
        ({"router": {"name": "topk", "score": "sigmoidal"}}, "no score is called 'sigmoidal'; did you mean 'sigmoid'"),
        ({"experts": {"name": "splits", "split": "clusters"}}, "did you mean 'clustered'"),
        ({"where": {"name": "every", "m": 2}}, "where 'every' has no option 'm'"),
        ({"router": 3}, "router must be a name or a mapping"),
        ({"router": {"k": 3}}, "router must be a name or a mapping with a 'name'"),
        ({"router": {"name": ["topk"]}}, "router must be a name or a mapping with a 'name', got {'name': ['topk']}"),
        ({"router": {"name": "topk", "k": 2.0}}, "router 'topk' needs a whole number as k, and not 2.0"),
        ({"router": {"name": "topk", "k": True}}, "router 'topk' needs a whole number as k, and not True"),
        ({"router": {"name": "topk", "scale": "2"}}, "router 'topk' needs a number as scale, and not '2'"),
        ({"router": {"name": "topk", "normalize": 1}}, "router 'topk' needs true or false as normalize, and not 1"),
        ({"router": {"name": "topk", "score": 3}}, "router 'topk' needs a name or a mapping as score, and not 3"),
        ({"router": {"name": "topk", "expert_groups": "expert_groups"}}, "'expert_groups' needs the option 'count'"),
        ({"router": {"name": "uniform", "weights": 0.5}}, "router 'uniform' needs a list or nothing as weights"),
        ({"where": "every"}, "where 'every' needs the option 'n'"),
        ({"router": nested(17)}, "router is nested in more than 16 others"),
        ([], "a recipe is a mapping of its fields, and not a list"),
        ({"num_experts": "many"}, "num_experts must be a whole number from 1 on, got 'many'"),
        ({"num_experts": 0}, "num_experts must be a whole number from 1 on, got 0"),
        ({"num_experts": True}, "num_experts must be a whole number"),
    ],
)  # fmt: skip
def test_what_a_file_says_wrongly_is_answered_with_what_was_meant(values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe.from_dict(values)


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("a.json", "{", ValueError, "is not valid JSON"),
        ("a.json", "[1]", ValueError, "must hold a mapping, not a list"),
        ("a.toml", "= 3", ValueError, "cannot be read"),
        ("a.toml", "a = " + "[" * 5000, ValueError, "cannot be read"),
        ("a.json", "[" * 5000, ValueError, "is not valid JSON"),
        ("a.toml", None, FileNotFoundError, "does not exist"),
        ("mixtrall", None, ValueError, "file is called 'mixtrall'; did you mean 'mixtral'"),
    ],
)
def test_an_unreadable_recipe_is_named(name, content, kind, words, tmp_path):
    source = tmp_path / name if "." in name else name
    if content is not None:
        source.write_text(content)
    with pytest.raises(kind, match=words):
        read_recipe(source)


def test_parts_of_ones_own_work_in_code_and_are_refused_by_files():
    class Mine(TopK):
        pass

    recipe = Recipe(num_experts=4, router=Mine, where=lambda model: ffn(model)[:1])
    assert len(sparse_layers(sparsify(causal_lm("llama"), recipe, verbose=False))) == 1
    with pytest.raises(ValueError, match=r"has no name, so a file cannot refer to it; .*moeify\.register\('where'"):
        recipe.to_dict()
