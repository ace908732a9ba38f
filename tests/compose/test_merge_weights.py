from functools import partial

import pytest
import torch
from torch import nn

from adapter_folders import answer, fill, layers, library, make_adapter, same
from moeify import Recipe, from_adapters, load, save, sparsify
from moeify.compose import merge_into_base, merge_into_experts
from moeify.experts import FFN
from moeify.find import linears
from moeify.routers import TopK, Uniform
from moeify.sparsify import frozen, lora, lora_ffn
from tiny_models import TINY


def networks(family: str, **recipe) -> nn.Module:
    model = TINY[family]().eval()
    parts = {"num_experts": 3, "router": TopK, "experts": partial(lora_ffn, rank=2, scale=0.5)} | recipe
    sparsify(model, Recipe(**parts), verbose=False)
    fill(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_merged_experts_compute_what_they_did_as_ordinary_experts(family, tmp_path):
    model = networks(family, router=partial(TopK, k=1, normalize=False))
    before = answer(model)
    merge_into_experts(model)
    assert all(type(layer.experts) is FFN for layer in layers(model).values())
    same(answer(model), before)
    save(model, tmp_path)
    assert torch.equal(answer(load(tmp_path)), answer(model))


def test_adapters_routed_in_every_layer_cannot_be_merged_into_experts(folders):
    model = library(folders)
    with pytest.raises(ValueError, match=r"q_proj and 5 other linear layers .* a router each.*merge_into_base"):
        merge_into_experts(model)
    with pytest.raises(ValueError, match="has FFN experts, not LoRA experts"):
        merge_into_experts(merge_into_experts(networks("llama")))
    with pytest.raises(ValueError, match="there is nothing to merge"):
        merge_into_experts(TINY["llama"]())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_an_adapter_library_under_fixed_weights_is_one_dense_model(family):
    weights = [0.5, -1.5, 2.0]
    where = linears("q_proj|down_proj|c_attn|c_fc|wo")
    model = TINY[family]().eval()
    parts = list(dict(model.named_modules()))
    recipe = Recipe(where=where, num_experts=3, router=partial(Uniform, weights=weights), experts=lora, shared=frozen)
    sparsify(model, recipe, verbose=False)
    fill(model)
    before = answer(model)
    merge_into_base(model, dict(zip("012", weights, strict=True)))
    same(answer(model), before)
    assert list(dict(model.named_modules())) == parts
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merging_leaves_tied_embeddings_as_they_are(tmp_path):
    model = TINY["gpt2"]().eval()
    from_adapters(model, {"head": make_adapter(tmp_path / "head", ["lm_head"], base=model)}, verbose=False)
    words = model.get_input_embeddings().weight
    before, logits = words.detach().clone(), answer(model)
    merge_into_base(model, {"head": 1.0})
    assert torch.equal(words, before)
    same(answer(model), logits)


def test_only_adapters_that_are_there_can_be_merged(folders):
    with pytest.raises(ValueError, match="there is no adapter art; there are: bio, law, med"):
        merge_into_base(library(folders), {"art": 1.0})
    with pytest.raises(ValueError, match=r"has LoRAFFN experts; merge_into_experts\(model\)"):
        merge_into_base(networks("llama"), {"0": 1.0})
