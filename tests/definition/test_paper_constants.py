"""Every setting of every named recipe against its source, and what the settings do at several numbers of experts."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from moeify import registry
from moeify.sparsify import Recipe, recipes
from plain_models import sparse_layers
from strategies import route
from tiny_models import DENSE

CONSTANTS = tomllib.loads((Path(__file__).parent / "paper_constants.toml").read_text(encoding="utf-8"))


def settings(recipe: Recipe) -> dict:
    found = {}
    for field, written in recipe.to_dict().items():
        kind = "router" if field == "decoder_router" else field
        of_kind = {kind: written} if isinstance(written, int) else registry.settings(kind, written)
        found |= {field + name.removeprefix(kind): value for name, value in of_kind.items()}
    return {name: value for name, value in found.items() if value not in (None, False, "", "nothing")}


@pytest.mark.parametrize("name", recipes)
def test_every_setting_is_what_its_source_says(name):
    assert settings(recipes[name]) == {setting: value for setting, (value, _) in CONSTANTS[name].items()}


def test_every_setting_has_a_source():
    assert CONSTANTS.keys() == recipes.keys()
    assert all(source for constants in CONSTANTS.values() for _, source in constants.values())


def router(name: str, experts: int) -> nn.Module:
    return recipes[name].router(16, experts)


@pytest.mark.parametrize("experts", [4, 8, 32])
def test_v_moes_noise_is_1_over_e(experts):
    assert router("vmoe", experts).router.noise == 1 / experts


@pytest.mark.parametrize(
    ("name", "experts", "slots"),
    [
        ("switch", 8, (160, 256)), ("switch", 32, (40, 64)), ("gshard", 8, (160, 256)), ("stmoe", 64, (20, 32)),
        ("nllb", 8, (256, None)), ("nllb", 32, (64, None)), ("vmoe", 8, (272, 1024)), ("vmoe", 32, (68, 256)),
        ("xmoe", 16, (64, 256)), ("limoe", 8, (128, 128)),
    ],
)  # fmt: skip
def test_slots_of_1024_tokens(name, experts, slots, monkeypatch):
    """By hand: 1.25 · 1024 / 8, 2 · ceil(1024 / 8), 4 · ceil(1.05 · 2 · 1024 / 8 / 4), ..."""
    limited, seen = router(name, experts), []
    monkeypatch.setattr(
        "moeify.routers.limited.limit",
        lambda routing, slots, **_: seen.extend([slots] if isinstance(slots, int) else slots) or routing,
    )
    for training in (True, False):
        before = len(seen)
        route(limited.train(training), torch.randn(1024, 16))
        seen += [None] * (len(seen) == before)
    assert tuple(seen) == slots


@pytest.mark.parametrize("experts", [4, 8, 32])
def test_nllb_drops_nothing_in_evaluation(experts):
    limited = router("nllb", experts).eval()
    torch.nn.init.zeros_(limited.router.weight)
    assert route(limited, torch.ones(64, 16)).counts.max() == 64


def test_nllb_renormalises_what_is_left_after_dropping():
    limited = router("nllb", 4).train()
    nn.init.normal_(limited.router.weight)
    routing = route(limited, torch.randn(64, 16) + 2 * torch.randn(16))
    sums = torch.zeros(64).index_add(0, routing.source, routing.weight)
    assert len(routing.source) < 128
    torch.testing.assert_close(sums[sums > 0], torch.ones_like(sums[sums > 0]))


@pytest.mark.parametrize(("name", "low", "high"), [("deepseek", 2.5, 2.5), ("longcat", 0.4, 0.7), ("qwen3", 1, 1)])
def test_weights_of_a_token_sum_to_the_scale(name, low, high):
    sums = route(router(name, recipes[name].num_experts), torch.randn(50, 16)).choices.weights.sum(-1)
    assert low - 1e-5 <= sums.min() <= sums.max() <= high + 1e-5


def vit(layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, **sizes))


def test_v_moe_is_in_the_last_two_odd_blocks_and_its_experts_start_equal():
    from moeify import sparsify

    sparse = sparse_layers(sparsify(vit(8), recipes["vmoe"], verbose=False))
    assert [int("".join(filter(str.isdigit, name))) for name in sparse] == [5, 7]
    for layer in sparse.values():
        assert all(torch.equal(w, w[:1].expand_as(w)) for w in layer.experts.parameters())


@pytest.mark.parametrize(("name", "layers", "sparse"), [("stmoe", 8, [3, 7]), ("nllb", 8, [3, 7]), ("soft", 4, [2, 3])])
def test_papers_place_their_sparse_layers(name, layers, sparse):
    from moeify import sparsify

    recipe = dataclasses.replace(recipes[name], num_experts=4)
    found = sparse_layers(sparsify(vit(layers), recipe, verbose=False))
    assert sorted({int("".join(filter(str.isdigit, n))) for n in found}) == sparse


def test_switch_shrinks_the_initial_weights_by_ten():
    from moeify import sparsify

    model = sparsify(
        DENSE["bert"](), dataclasses.replace(recipes["switch"], router=recipes["mixtral"].router), verbose=False
    )
    weight = next(iter(sparse_layers(model).values())).experts.down[0]
    assert weight.std().item() == pytest.approx(0.88 * (0.1 / weight.shape[-1]) ** 0.5, rel=0.05)


def test_switch_jitters_what_the_router_reads():
    jittered = router("switch", 8).router
    ratio = jittered.train()._jittered(torch.ones(4000, 16))
    assert 0.99 <= ratio.min() < 0.991
    assert 1.009 < ratio.max() <= 1.01
