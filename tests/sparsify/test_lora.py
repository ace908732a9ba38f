from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, sparsify
from moeify.experts import LoRA, LoRAFFN
from moeify.find import linears, modules
from moeify.routers import TopK
from moeify.sparsify import dense, frozen, lora, lora_ffn
from moeify.store import load, save
from tiny_models import TINY, inputs


def _adapted(model: nn.Module, where=None, **recipe) -> nn.Module:
    where = linears() if where is None else where
    parts = {"router": TopK, "experts": partial(lora, rank=3), "shared": frozen} | recipe
    return sparsify(model, Recipe(where=where, num_experts=4, **parts), verbose=False)


def _layers(model: nn.Module) -> dict[str, MoE]:
    return {name: part for name, part in model.named_modules() if isinstance(part, MoE)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "vit"])
def test_adapters_beside_every_linear_map_start_as_nothing(family):
    model = TINY[family]()
    before = model(**inputs(model)).logits
    _adapted(model)
    torch.testing.assert_close(model(**inputs(model)).logits, before)
    layers = _layers(model)
    assert all(isinstance(layer.experts, LoRA) for layer in layers.values())
    for layer in layers.values():
        nn.init.normal_(layer.experts.lora_B)
    assert (model(**inputs(model)).logits - before).abs().max() > 0.1


def test_the_maps_are_chosen_by_name_and_every_one_decides_for_itself():
    layers = _layers(_adapted(TINY["llama"](), linears(r"q_proj|v_proj")))
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}
    assert len({id(layer.router) for layer in layers.values()}) == len(layers) == 4


def test_the_map_beside_frozen_adapters_takes_no_more_memory_and_does_not_learn():
    model = TINY["llama"]()
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    for name, layer in _layers(_adapted(model)).items():
        assert layer.shared.weight.data_ptr() == weights[f"{name}.weight"]
        assert not layer.shared.weight.requires_grad
        assert layer.experts.lora_B.requires_grad


def test_a_map_may_learn_with_its_adapters():
    assert all(layer.shared.weight.requires_grad for layer in _layers(_adapted(TINY["gpt2"](), shared=dense)).values())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_torchs_own_encoder_asks_its_adapters_also_where_it_has_a_fast_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    before = encoder(x)
    layers = _layers(_adapted(encoder))
    assert set(layers) == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}  # no map inside the attention
    for layer in layers.values():
        nn.init.normal_(layer.experts.lora_B)
    assert (encoder(x) - before).abs().max() > 0.1


def test_a_network_with_low_rank_changes_starts_as_the_dense_one_and_shares_its_memory():
    model = TINY["llama"]()
    down = {p.data_ptr() for name, p in model.named_parameters() if "down_proj" in name}
    before = model(**inputs(model)).logits
    sparsify(model, Recipe(num_experts=4, router=TopK, experts=partial(lora_ffn, rank=2)), verbose=False)
    torch.testing.assert_close(model(**inputs(model)).logits, before)
    experts = [layer.experts for layer in _layers(model).values()]
    assert {bank.down.weight.data_ptr() for bank in experts} == down
    assert all(isinstance(bank, LoRAFFN) and not bank.up.weight.requires_grad for bank in experts)


def test_only_a_feed_forward_network_has_two_maps_to_change():
    with pytest.raises(ValueError, match="this is a Linear; use lora"):
        _adapted(TINY["llama"](), modules(r"q_proj"), experts=lora_ffn, shared=lambda dense, width: None)


def test_an_adapted_model_is_saved_and_loaded(tmp_path):
    model = _adapted(TINY["llama"](), linears(r"_proj"))
    for layer in _layers(model).values():
        nn.init.normal_(layer.experts.lora_B)
    save(model, tmp_path)
    torch.testing.assert_close(load(tmp_path)(**inputs(model)).logits, model.eval()(**inputs(model)).logits)
