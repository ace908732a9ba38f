"""Merged adapters against their formulas, and the search for weights against a loss whose minimum is known."""

import sys
from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, sparsify
from moeify.compose import combine_adapters, combine_adapters_by_search, combine_lora
from moeify.experts import LoRA
from moeify.find import linears
from moeify.routers import Arrow, Uniform
from moeify.sparsify import frozen, lora
from moeify.store import load, save
from tiny_models import TINY, inputs

pytestmark = pytest.mark.filterwarnings("ignore:COBYLA")  # of a search with a small budget
D, OUT, E = 6, 5, 3
W = [0.5, -1.0, 0.25]


def adapters(scale: float = 0.5) -> LoRA:
    experts = LoRA(E, D, OUT, rank=2, scale=scale)
    nn.init.normal_(experts.lora_B)
    return experts


def test_products_are_merged_exactly_at_a_rank_of_all_together():
    experts = adapters()
    experts.scale.copy_(torch.tensor([0.5, 2.0, 1.0]))
    one = combine_lora(experts, W)
    assert one.rank == 2 * E
    torch.testing.assert_close(one.delta(0), sum(w * experts.delta(j) for j, w in enumerate(W)))
    torch.testing.assert_close(combine_lora(experts).delta(0), sum(experts.delta(j) for j in range(E)) / E)


def test_merged_separately_the_product_is_one_of_sums():
    experts = adapters()
    one = combine_lora(experts, W, separately=True)
    b = sum(w * experts.lora_B[j] for j, w in enumerate(W))
    a = sum(w * experts.lora_A[j] for j, w in enumerate(W))
    assert one.rank == 2
    torch.testing.assert_close(one.delta(0), (0.5 * b @ a).detach())
    assert (one.delta(0) - combine_lora(experts, W).delta(0)).abs().max() > 0.01


def library() -> nn.Module:
    recipe = Recipe(
        where=linears("q_proj|v_proj"), num_experts=E, router=Arrow, experts=partial(lora, rank=2), shared=frozen
    )
    torch.manual_seed(0)
    model = sparsify(TINY["llama"](), recipe, verbose=False)
    for part in model.modules():
        if isinstance(part, LoRA):
            nn.init.normal_(part.lora_B)
    return model


def test_a_merged_model_computes_what_fixed_weights_compute_and_is_saved(tmp_path):
    merged, model = combine_adapters(library(), W), library()
    for part in model.modules():
        if isinstance(part, MoE):
            part.router = Uniform(32, E, weights=W)
    expected = model(**inputs(model)).logits
    torch.testing.assert_close(merged(**inputs(model)).logits, expected, rtol=1e-4, atol=1e-4)
    save(merged, tmp_path)
    torch.testing.assert_close(load(tmp_path)(**inputs(model)).logits, expected, rtol=1e-4, atol=1e-4)


def deltas(model: nn.Module) -> torch.Tensor:
    return torch.cat([part.delta(0).flatten() for part in model.modules() if isinstance(part, LoRA)])


def test_the_search_finds_the_weights_of_least_loss():
    pytest.importorskip("nevergrad")
    target = deltas(combine_adapters(library(), [0.8, 0.0, -0.6], separately=True))
    tried = []

    def loss(model: nn.Module) -> float:
        tried.append((deltas(model) - target).square().mean().item())
        return tried[-1]

    model = library()
    weights = combine_adapters_by_search(model, loss, budget=150, penalty=0.0)
    assert len(tried) == 150
    assert all(abs(w) <= 1.5 for w in weights)
    assert loss(model) < 0.2 * tried[0]
    assert tried[0] == pytest.approx(target.square().mean().item())  # w = 0 comes first
    assert torch.equal(deltas(model), deltas(combine_adapters(library(), weights, separately=True)))
    assert weights == combine_adapters_by_search(library(), loss, budget=150, penalty=0.0)


def test_without_a_loss_the_penalty_leaves_no_adapter():
    pytest.importorskip("nevergrad")
    assert max(map(abs, combine_adapters_by_search(library(), lambda model: 0.0, budget=30))) < 0.05


def test_a_search_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = library()
    parts = [(part.experts, part.router) for part in model.modules() if isinstance(part, MoE)]
    with pytest.raises(ValueError, match=r"the loss is nan for the weights \["):
        combine_adapters_by_search(model, lambda model: float("nan"), budget=3)
    assert [(part.experts, part.router) for part in model.modules() if isinstance(part, MoE)] == parts
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ImportError, match=r"pip install 'moeify\[adapters\]'"):
        combine_adapters_by_search(model, lambda model: 0.0)


def test_what_cannot_be_merged_is_refused():
    experts = adapters()
    with pytest.raises(ValueError, match="2 weights for 3 adapters"):
        combine_lora(experts, [1, 2])
    experts.scale[0] = 2
    with pytest.raises(ValueError, match="cannot be combined separately"):
        combine_lora(experts, separately=True)
    with pytest.raises(ValueError, match="has no adapters to combine"):
        combine_adapters(TINY["llama"]())
