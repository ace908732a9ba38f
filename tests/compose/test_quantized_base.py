"""Bases whose weights are packed or of 8 bits: adapters need their widths alone, everything else says what they are."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adapter_folders import answer, library, make_adapter, same
from moeify import Recipe, from_adapters, load_adapters, save_adapters, sparsify
from moeify.compose import merge_into_base
from moeify.find import linears, modules, named
from moeify.routers import TopK
from moeify.sparsify import dense, frozen, lora
from plain_models import sparse_layers
from tiny_models import TINY, inputs


class Packed(nn.Linear):
    """A linear layer as libraries of quantisation have it: a weight of uint8 in a shape of its own, and the widths."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        self.full = [dense.weight.detach()]
        packed = torch.zeros(dense.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.full[0], self.bias)


class Float8(Packed):
    """The same with a weight of its shape, of 8 bits."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense)
        self.weight = nn.Parameter(dense.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def quantized(kind: type[Packed], family: str = "llama") -> nn.Module:
    model = TINY[family]().eval()
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is nn.Linear and name != "lm_head":
                setattr(module, name, kind(part))
    return model


@pytest.mark.parametrize("kind", [Packed, Float8])
def test_adapters_stand_beside_a_quantised_base(kind, tmp_path):
    folders = {name: make_adapter(tmp_path / name, ["q_proj", "down_proj"], seed=e) for e, name in enumerate("ab")}
    torch.manual_seed(0)
    expected = library(folders, TopK)
    model = from_adapters(quantized(kind), folders, TopK, verbose=False)
    for (name, layer), (_, other) in zip(model.named_modules(), expected.named_modules(), strict=True):
        if name.endswith(".router"):
            layer.load_state_dict(other.state_dict())
    same(answer(model), answer(expected))
    save_adapters(model, tmp_path / "library")
    same(answer(load_adapters(quantized(kind), tmp_path / "library")), answer(expected))
    with pytest.raises(ValueError, match=r"the base is quantised: .*q_proj has a weight of torch\.\w+8"):
        merge_into_base(model, {"a": 1.0})


@pytest.mark.parametrize("kind", [Packed, Float8])
def test_a_quantised_base_is_not_made_sparse_and_is_told_so(kind):
    model = quantized(kind)
    with pytest.raises(
        ValueError, match=r"the base is quantised: model.layers.0.* is a (Packed|Float8) with .*from_adapters"
    ):
        sparsify(model, Recipe(), verbose=False)


@pytest.mark.parametrize("kind", [Packed, Float8])
def test_low_rank_experts_need_the_widths_of_a_quantised_base_only(kind):
    recipe = Recipe(where=linears("(q_proj|down_proj)$"), num_experts=3, experts=partial(lora, rank=2), shared=frozen)
    model = quantized(kind).bfloat16()
    for part in model.modules():
        if isinstance(part, Packed):
            part.full[0] = part.full[0].bfloat16()
    if kind is Packed:
        assert {part.weight.dtype for part in model.modules() if isinstance(part, Packed)} == {torch.uint8}
    before = answer(model)
    sparsify(model, recipe, verbose=False)
    assert torch.equal(answer(model), before)
    assert len(sparse_layers(model)) == 4
    learned = {p.dtype for p in model.parameters() if p.requires_grad and p.dim() == 3}
    assert learned == {torch.bfloat16}
    answer_with_gradient = model(**inputs(model)).logits.sum()
    answer_with_gradient.backward()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(where=linears("q_proj$")),
        Recipe(where=modules("mlp$")),
        Recipe(where=named("mlp$")),
        Recipe(where=linears("q_proj$"), experts=lora, shared=dense),
    ],
    ids=["linears", "modules", "named", "trained"],
)
@pytest.mark.parametrize("kind", [Packed, Float8])
def test_whatever_needs_weights_says_that_the_base_is_quantised(kind, recipe):
    with pytest.raises(ValueError, match=r"the base is quantised: .*where=linears\(\.\.\.\), experts=lora"):
        sparsify(quantized(kind), recipe, verbose=False)


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_model_with_peft_adapters_is_told_to_merge_them(layers):
    peft = pytest.importorskip("peft")
    base = TINY["llama"]()
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=layers)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(ValueError, match=r"PEFT adapters are on .*mlp.down_proj, .*merge_and_unload\(\)"):
        sparsify(model, Recipe(num_experts=2), verbose=False)
    sparsify(model.merge_and_unload(), Recipe(num_experts=2), verbose=False)
