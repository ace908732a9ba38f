"""Routers of one stack that work together: one decision for all (Mobile V-MoE), gating residuals (MoE++)."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import Context, MoE, Recipe, record, sparsify
from moeify.backends import compose
from moeify.experts import FFN, Each
from moeify.find import last
from moeify.flops import count
from moeify.losses import supervision
from moeify.routers import Capacity, DefaultVector, MoLE, Residual, ReusedRouting, SharedRouting, TopK
from moeify.routers.shared_routing import shared_routing
from moeify.sparsify import fresh
from moeify.train.activation_checkpointing import enable
from strategies import agree, doubled, gradients, route, sharpen
from tiny_models import DENSE, causal_lm, inputs

T, D, E = 7, 6, 4
PER_IMAGE = partial(shared_routing, router=partial(TopK, k=1, normalize=False, per="sequence"))


def routers(model: nn.Module) -> list[nn.Module]:
    return [layer.router for layer in model.modules() if isinstance(layer, MoE)]


def test_the_first_layer_decides_for_all_images_and_layers():
    recipe = Recipe(where=last(2), num_experts=E, router=PER_IMAGE, experts=fresh)
    model = sparsify(DENSE["vit"](), recipe, verbose=False)
    first, second = routers(model)
    assert isinstance(first, SharedRouting)
    assert isinstance(second, ReusedRouting)
    assert not list(second.parameters())
    for seed in range(2):
        with record(model) as decisions:
            model(**inputs(model, seed=seed)).loss.backward()
        one, other = decisions.values()
        assert one is other
        assert one.logits.shape == (2, E)
    assert first.router.weight.grad.any()


def test_followers_of_followers_follow_the_first():
    leader = SharedRouting(TopK(D, E))
    follower = SharedRouting(TopK(D, E)).link_to(SharedRouting(TopK(D, E)).link_to(leader))
    assert follower.shared is leader
    assert (follower.rows_per_token(), follower.causal, follower.weights_sum_to_one) == (2, True, True)


def test_a_stack_that_decides_once_costs_what_it_costs_to_decide_everywhere():
    each, together = (
        sparsify(DENSE["vit"](), Recipe(num_experts=E, router=router, experts=fresh), verbose=False)
        for router in (partial(TopK, per="sequence"), partial(shared_routing, router=partial(TopK, per="sequence")))
    )
    assert count(each).flops - count(together).flops == 2 * 32 * E  # one router less


@pytest.mark.parametrize("inner", [SharedRouting(TopK(D, E)), Residual(D, E)])
def test_a_layer_before_that_has_not_decided_is_missed(inner):
    router = type(inner)(TopK(D, E)) if isinstance(inner, SharedRouting) else type(inner)(D, E)
    with pytest.raises(ValueError, match="in this forward pass; run the whole model"):
        route(router.link_to(inner), torch.randn(T, D))


def test_other_tokens_cannot_follow():
    leader, context = SharedRouting(TopK(D, E)), Context()
    leader(torch.randn(T, D), context)
    with pytest.raises(ValueError, match="let layers of different shapes decide for themselves"):
        ReusedRouting(leader)(torch.randn(T + 1, D), context)


@pytest.mark.parametrize("k", [2, 3])
def test_a_router_adds_what_the_one_before_computed(k):
    context = Context()
    maps = [Each([nn.Linear(D, D, bias=False) for _ in range(E)]) for _ in range(2)]
    first = MoE(Residual(D, E, k=k), maps[0], context=context)
    second = MoE(Residual(D, E, k=k).link_to(first.router), maps[1], context=context)
    both = nn.Sequential(first, second)
    sharpen(both)
    nn.init.normal_(second.router.residual)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(both), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        before = None
        for i in range(2):
            z = p[f"{i}.router.weight"] @ token
            if before is not None:
                z = z + p["1.router.residual"] @ before
            best = sorted(range(E), key=lambda j, z=z: -z[j].item())[:k]
            total = sum(torch.exp(z[j]) for j in best)
            token = sum(torch.exp(z[j]) / total * (p[f"{i}.experts.experts.{j}.weight"] @ token) for j in best)
            before = z
        slow.append(token)
    agree(both(x), [x, *both.parameters()], torch.stack(slow), [x64, *p.values()])


@pytest.mark.parametrize(("silent", "k"), [(1, 2), (2, 2), (1, 3)])
def test_a_silent_expert_takes_no_weight_and_a_hidden_layer_bends_the_map(silent, k):
    router = Residual(D, E, k=k, zero_experts=silent, hidden=5)
    sharpen(router)
    nn.init.normal_(router.hidden)
    moe = MoE(router, Each([nn.Linear(D, D, bias=False) for _ in range(E)]))
    x = torch.randn(40, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow, lost = [], 0
    for token in x64:
        z = p["router.weight"] @ torch.tanh(p["router.hidden"] @ token)
        best = sorted(range(E), key=lambda j, z=z: -z[j].item())[:k]
        speaking = [j for j in best if j < E - silent]
        lost += not speaking
        total = sum(torch.exp(z[j]) for j in speaking)
        slow.append(
            sum((torch.exp(z[j]) / total * (p[f"experts.experts.{j}.weight"] @ token) for j in speaking), 0 * token)
        )
    assert (lost > 0) == (silent == k)
    assert router.weights_sum_to_one == (silent < k)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def test_all_experts_cannot_be_silent():
    with pytest.raises(ValueError, match="leaves no other expert"):
        Residual(D, E, zero_experts=E)


def test_a_capacity_around_them_keeps_the_link():
    first, second = Capacity(Residual(D, E), factor=1.0), Capacity(Residual(D, E), factor=1.0)
    context, x = Context(), torch.randn(T, D)
    first(x, context)
    linked = second.link_to(first)
    assert linked.router.residual is not None
    assert linked(x, context).counts.max() <= 4


@pytest.mark.parametrize("router", [partial(shared_routing, router=TopK), Residual])
def test_recomputation_reads_the_layer_before_as_it_was(router):
    found = []
    for repeat in (False, True):
        torch.manual_seed(0)
        recipe = Recipe(num_experts=E, router=router, experts=fresh)
        model = sparsify(causal_lm("llama", num_hidden_layers=3), recipe, verbose=False).train()
        if repeat:
            enable(model)
        model(**inputs(model)).loss.backward()
        found.append([p.grad for p in model.parameters()])
        assert all(p.grad.any() for router in routers(model) for p in router.parameters())
    for plain, repeated in zip(*found, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=0, atol=0)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_supervision_is_the_cross_entropy_with_the_wanted_expert(per):
    router, x, target = TopK(D, E, per=per), torch.randn(3, 5, D), torch.tensor([2, 0, 3])
    loss = supervision(route(router, x), target)
    weight = router.weight.detach().double().requires_grad_()
    slow = torch.zeros((), dtype=torch.float64)
    units = [image.mean(0, keepdim=True) if per == "sequence" else image for image in x.double()]
    for image, wanted in zip(units, target.tolist(), strict=True):
        for unit in image:
            z = [w @ unit for w in weight]
            slow = slow - torch.log(torch.exp(z[wanted]) / sum(torch.exp(z_j) for z_j in z)) / sum(map(len, units))
    torch.testing.assert_close(loss.double(), slow)
    torch.testing.assert_close(gradients(loss, [router.weight])[0].double(), gradients(slow, [weight])[0])


@pytest.mark.parametrize("holder", [MoLE, DefaultVector])
def test_a_shared_decision_brings_no_outputs_of_the_first_layers_experts(holder):
    first = MoE(SharedRouting(holder(D, E)), FFN(E, D, 8))
    second = MoE(ReusedRouting(first.router), FFN(E, D, 8), context=first.context)
    x = torch.randn(T, D)
    first(x)
    decision = second.router(x, second.context)
    torch.testing.assert_close(second(x), compose(x, decision, second.experts))
    assert decision.expert_outputs is None
    assert (second(x) - first(x)).abs().max() > 1e-3
