"""LLaMA-MoE's splits and importances by slow loops: which hidden units an expert gets, and how much they are needed."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeify import Recipe, load, save, sparsify
from moeify.experts import Plain
from moeify.find import DenseFFN
from moeify.layers import moe_layers
from moeify.routers import TopK
from moeify.sparsify import recipes, residual, residual_splits, splits, start_routers
from moeify.sparsify.split import (
    by_weights,
    coactivated,
    independent,
    inner,
    measure_coactivation,
    measure_importance,
    measure_token_importance,
)
from moeify.sparsify.split.coactivation import refined
from moeify.sparsify.split.residual import residual_units
from tiny_models import causal_lm


def given(scores: torch.Tensor):
    return lambda dense, parts: scores


def ffn(hidden: int = 12, bias: bool = True) -> DenseFFN:
    return DenseFFN([nn.Linear(6, hidden, bias=bias)], nn.Linear(hidden, 6, bias=bias), Plain(F.gelu)).double()


def greedily(scores: torch.Tensor, size: int, free: list[int]) -> list[list[int]]:
    """The authors' loop: of every expert's best free unit, the highest is assigned next."""
    parts = [[] for _ in scores]
    free = set(free)
    while free:
        _, e, unit = max((scores[e, u].item(), e, u) for e in range(len(scores)) if len(parts[e]) < size for u in free)
        parts[e].append(unit)
        free.remove(unit)
    return [sorted(part) for part in parts]


def test_independent_gives_the_highest_importance_that_is_free_next():
    scores = torch.rand(3, 12)
    parts = independent(ffn(), 3, importance=given(scores))
    assert parts.tolist() == greedily(scores, 4, list(range(12)))


def test_inner_gives_every_expert_what_it_needs_most():
    scores = torch.rand(3, 12)
    parts = inner(ffn(), 3, importance=given(scores))
    for e in range(3):
        best = sorted(range(12), key=lambda u: -scores[e, u].item())[:4]
        assert set(parts[e].tolist()) == set(best)


def test_the_shared_expert_has_the_units_that_most_experts_name_in_rounds():
    scores = torch.rand(3, 16) + torch.linspace(0, 0.5, 16)
    size, taken = 4, []
    while len(taken) < size:
        named = [0] * 16
        for e in range(3):
            left = [u for u in range(16) if u not in taken]
            for unit in sorted(left, key=lambda u: -scores[e, u].item())[:size]:
                named[unit] += 1
        most = [u for u in range(16) if named[u] == max(named)]
        taken += most[: size - len(taken)]
    shared, routed = residual_units(scores, 1)
    assert shared.tolist() == taken
    assert routed.tolist() == greedily(scores, size, [u for u in range(16) if u not in taken])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_shared_and_routed_experts_add_up_to_the_dense_network(parts, bias):
    dense, x = ffn(12, bias), torch.randn(5, 6, dtype=torch.float64)
    experts = residual_splits(dense, 4 - parts, parts=parts)
    shared = residual(dense, 6, num_experts=4 - parts, parts=parts)
    total = shared(x) + experts.all_outputs(x).sum(1)
    torch.testing.assert_close(total, dense(x))


def test_swaps_make_the_cut_as_light_as_they_can():
    block = torch.arange(12) % 3
    graph = (block.unsqueeze(0) == block.unsqueeze(1)).float() + 0.1 * torch.rand(12, 12)
    graph = (graph + graph.t()).fill_diagonal_(0)
    parts = refined(graph, torch.arange(12).view(3, 4))
    assert sorted(sorted((part % 3).tolist()) for part in parts) == [[0] * 4, [1] * 4, [2] * 4]


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    return causal_lm("llama").double()


def batches(count: int = 2, padded: bool = True) -> list[dict]:
    made = []
    for _ in range(count):
        ids = torch.randint(0, 60, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        made.append({"input_ids": ids, "labels": ids} | ({"attention_mask": mask} if padded else {}))
    return made


def by_loop(model: nn.Module, batch: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each network reads at real tokens, and |h · ∂L/∂h| there, by the gradient of a factor of h."""
    seen, ones = [], []

    def multiply(module, args):
        factor = torch.ones_like(args[0], requires_grad=True)
        ones.append(factor)
        return (args[0] * factor,)

    mlps = [layer.mlp for layer in model.model.layers]
    handles = [mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach())) for mlp in mlps]
    handles += [mlp.down_proj.register_forward_pre_hook(multiply) for mlp in mlps]
    gradients = torch.autograd.grad(model.eval()(**batch).loss, ones)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(2, 7, dtype=torch.bool)
    return [(x[real], g[real].abs()) for x, g in zip(seen, gradients, strict=True)]


def test_importance_is_the_mean_change_of_each_cluster(llama):
    clusters = [batches(2), batches(1, padded=False)]
    measured = measure_importance(llama, clusters)
    for i, layer in enumerate(llama.model.layers):
        of = measured(SimpleNamespace(down=layer.mlp.down_proj), 2)
        for values, cluster in zip(of, clusters, strict=True):
            expected = torch.cat([by_loop(llama, batch)[i][1] for batch in cluster]).mean(0)
            torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-9)
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_tokens_count_for_the_cluster_that_a_router_of_its_centres_would_send_them_to(llama):
    given = batches(3)
    measured = measure_token_importance(llama, given, 3)
    for i, (name, layer) in enumerate(llama.model.layers.named_children()):
        centres = measured.centres[f"model.layers.{name}.mlp"]
        sums, sizes = torch.zeros(3, layer.mlp.down_proj.in_features), [0, 0, 0]
        for x, change in [by_loop(llama, batch)[i] for batch in given]:
            for token, values in zip(x, change, strict=True):
                c = int((centres @ token.float()).argmax())
                sums[c] += values.float()
                sizes[c] += 1
        expected = sums / torch.tensor(sizes).clamp_min(1).unsqueeze(1)
        of = measured(SimpleNamespace(down=layer.mlp.down_proj), 3)
        torch.testing.assert_close(of, expected, rtol=1e-4, atol=1e-9)


def test_coactivation_is_the_sum_of_products_of_sizes(llama):
    given = batches(1)
    hidden = []
    layer = llama.model.layers[1].mlp
    handle = layer.down_proj.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    llama.eval()(**given[0])
    handle.remove()
    h = hidden[0][given[0]["attention_mask"].bool()].abs().float()
    expected = sum(torch.outer(row, row) for row in h)
    measured = measure_coactivation(llama, given)(SimpleNamespace(down=layer.down_proj), 4)
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["independent", "inner", "coactivated", "residual"])
def test_a_measured_split_is_made_saved_and_loaded(kind, llama, tmp_path):
    given = batches(2)
    llama, num_experts, shared = llama.float(), 4, {}
    if kind == "coactivated":
        experts = partial(splits, split=partial(coactivated, importance=measure_coactivation(llama, given)))
    elif kind == "residual":
        measured, num_experts = measure_token_importance(llama, given, 3), 3
        experts = partial(residual_splits, importance=measured)
        shared = {"shared": partial(residual, importance=measured)}
    else:
        measured = measure_importance(llama, [given] * 4)
        split = {"independent": independent, "inner": inner}[kind]
        experts = partial(splits, split=partial(split, importance=measured))
    router = partial(TopK, k=1, normalize=False)
    sparsify(llama, Recipe(num_experts=num_experts, router=router, experts=experts, **shared), verbose=False)
    if kind == "residual":
        start_routers(llama, measured)
        assert torch.equal(next(iter(moe_layers(llama).values())).router.weight, measured.centres["model.layers.0.mlp"])
    expected = llama.eval()(input_ids=given[0]["input_ids"]).logits
    save(llama, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(input_ids=given[0]["input_ids"]).logits, expected)


@pytest.mark.parametrize("name", ["independent", "coactivated"])
def test_a_partition_with_all_experts_is_the_dense_model(name, llama):
    given = batches(2)
    importance = measure_coactivation(llama, given) if name == "coactivated" else by_weights
    split = partial({"independent": independent, "coactivated": coactivated}[name], importance=importance)
    before = llama.eval()(**given[0]).logits
    every = partial(TopK, k=4, init_std=0.0)
    sparsify(llama, Recipe(num_experts=4, router=every, experts=partial(splits, split=split)), verbose=False)
    torch.testing.assert_close(
        llama(**given[0]).logits[given[0]["attention_mask"].bool()], before[given[0]["attention_mask"].bool()]
    )


def test_what_was_measured_elsewhere_is_refused(llama):
    measured = measure_importance(causal_lm("llama"), [batches(1)] * 4)
    recipe = Recipe(num_experts=4, experts=partial(splits, split=partial(inner, importance=measured)))
    with pytest.raises(ValueError, match="measure the very model that is made sparse"):
        sparsify(llama, recipe, verbose=False)
    here = measure_importance(llama, [batches(1)] * 3)
    with pytest.raises(ValueError, match="measured for 3 clusters, and 4 experts"):
        sparsify(
            llama, Recipe(num_experts=4, experts=partial(splits, split=partial(inner, importance=here))), verbose=False
        )


def test_shared_and_routed_parts_that_do_not_belong_together_are_refused(llama):
    recipe = dataclasses.replace(recipes["llama_moe_v2"], num_experts=3)
    with pytest.raises(ValueError, match="differ in parts: 1 and 2"):
        sparsify(llama, dataclasses.replace(recipe, shared=partial(residual, parts=2)), verbose=False)
    alone = Recipe(num_experts=3, router=partial(TopK, k=1, normalize=False), experts=residual_splits)
    with pytest.raises(ValueError, match="use both"):
        sparsify(llama, alone, verbose=False)
