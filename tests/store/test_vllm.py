"""How vLLM runs a saved model is what vLLM's own matcher finds in the modelling file, where vLLM is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest
import torch

from moeify import Recipe, save, sparsify
from moeify.routers import ExpertGroups, Soft, TopK, sigmoid, sqrt_softplus
from moeify.sparsify import dense, gated
from moeify.sparsify.make import fresh
from moeify.store.modelling_file import NAME
from moeify.store.vllm import AS_WRITTEN, FUSED, OWN_ROUTER, vllm_routing
from tiny_models import causal_lm

made = partial(Recipe, num_experts=4, experts=fresh)
GROUPS = ExpertGroups(count=2, keep=1, reduce="max")
CASES = {
    "softmax": (made(), FUSED),
    "sigmoid": (made(router=partial(TopK, k=2, score=sigmoid, scale=2.0)), FUSED),
    "groups": (made(router=partial(TopK, k=1, expert_groups=GROUPS, normalize=False)), FUSED),
    "shared": (made(shared=dense), FUSED),
    "gated": (made(shared=gated), FUSED),
    "bias": (made(router=partial(TopK, k=2, selection_bias=True)), OWN_ROUTER),
    "score": (made(router=partial(TopK, k=2, score=sqrt_softplus)), OWN_ROUTER),
}


def sparse(recipe, **config):
    return sparsify(causal_lm("llama", **config), recipe, verbose=False, allow_noncausal=True).eval()


@pytest.mark.parametrize("case", CASES)
def test_vllm_replaces_routers_and_experts_that_it_computes(case, tmp_path):
    recipe, expected = CASES[case]
    model = sparse(recipe)
    assert vllm_routing(model) == expected
    save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["num_experts"], config["routed_scaling_factor"]) == (4, model.model.layers[0].mlp.router.scale)
    assert config["moe_intermediate_size"] == model.model.layers[0].mlp.experts.hidden


def test_vllm_leaves_layers_that_its_experts_would_compute_differently(tmp_path):
    groups = ExpertGroups(count=2, keep=1, reduce="top2")
    top_2_of_groups = partial(TopK, k=1, expert_groups=groups, normalize=False)
    for model in (
        sparse(made(), hidden_act="gelu"),
        sparse(made(router=top_2_of_groups)),
    ):
        assert vllm_routing(model) == AS_WRITTEN
    save(model, tmp_path / "saved")
    assert "num_experts" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert vllm_routing(sparse(made(router=Soft))).startswith("refused: its layers are")


@pytest.fixture(scope="module")
def matcher():
    """The class in vLLM that finds what it can replace, with stand-ins for the rest of vLLM."""
    if (found := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vllm is not installed")
    root = Path(next(iter(found.submodule_search_locations)))
    inner = "vllm.model_executor.models.transformers"
    names = ["vllm", "vllm.distributed", "vllm.logger", "vllm.model_executor.layers.fused_moe", f"{inner}.utils"]
    names += ["vllm.model_executor.layers.linear", "vllm.model_executor.models.utils"]
    stubs = {name: mock.MagicMock() for name in names}
    stubs[f"{inner}.utils"].named_state = lambda module: chain(module.named_parameters(), module.named_buffers())
    with mock.patch.dict(sys.modules, stubs):
        for name in ("fx_utils", "fusers.moe"):
            file = root / "/".join(f"{inner}.{name}".split(".")[1:])
            spec = importlib.util.spec_from_file_location(f"{inner}.{name}", file.with_suffix(".py"))
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        yield module.MoEBlockFuser


@pytest.mark.parametrize("case", CASES)
def test_the_matcher_of_vllm_finds_what_moeify_says(case, matcher, tmp_path):
    recipe, expected = CASES[case]
    model = sparse(recipe)
    save(model, tmp_path / "saved")
    spec = importlib.util.spec_from_file_location("modelling", tmp_path / "saved" / NAME)
    file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file)
    block = file.SparseLlamaForCausalLM.from_pretrained(tmp_path / "saved").model.layers[0].mlp
    assert all(parameter.dim() == 3 for parameter in block.experts.parameters())
    found = matcher.match(block, "experts")
    assert (found is not None and found.scoring_func is not None) == (expected == FUSED)
    if expected == FUSED:
        assert found.renormalize == recipe.router(8, 4).normalize
        assert found.router_dtype == torch.float32
        assert (found.shared_name is None) == (model.model.layers[0].mlp.shared is None)
