"""Whoever changes a layer's experts, its router works with the new ones and lets go of the old ones."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from adapter_folders import fill, layers
from moeify import MoE, Recipe, record, routers, sparsify
from moeify.compose import combine_adapters, combine_adapters_by_search, merge_into_experts
from moeify.compress import quantize_experts
from moeify.experts import FFN
from moeify.find import linears
from moeify.kernels.cpu import cpp
from moeify.record import replay
from moeify.routers import Arrow, Capacity, Compete, DefaultVector, MoLE, Router, SharedRouting, TopK
from moeify.serve import fast_decode
from moeify.sparsify import fresh, frozen, lora, lora_ffn
from tiny_models import TINY, inputs

WIDTH = 32
HOLDERS = [part for part in vars(routers).values() if getattr(part, "attach", Router.attach) is not Router.attach]
READS_NETWORKS = [holder for holder in HOLDERS if holder is not Arrow]
FAMILIES = {
    "networks": {"experts": fresh},
    "changes of a network": {"experts": partial(lora_ffn, rank=2)},
    "adapters": {"experts": partial(lora, rank=2), "shared": frozen, "where": linears("q_proj|o_proj")},
}


def made(router, experts: str) -> nn.Module:
    torch.manual_seed(0)
    model = sparsify(TINY["llama"]().eval(), Recipe(num_experts=3, router=router, **FAMILIES[experts]), verbose=False)
    if experts != "networks":
        fill(model)
    return model


def tensors_in_reach(thing: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that a module holds, registered or not."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from tensors_in_reach(vars(thing), seen)
    elif isinstance(thing, dict):
        yield from tensors_in_reach(list(thing.values()), seen)
    elif isinstance(thing, list | tuple | set):
        for part in thing:
            yield from tensors_in_reach(part, seen)


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [layer.experts for layer in layers(model).values()]


def output_of_experts(layer: MoE) -> Tensor:
    dtype = next(tensor.dtype for tensor in layer.experts.state_dict().values() if tensor.is_floating_point())
    x = torch.linspace(-1, 1, 10 * WIDTH).view(2, 5, WIDTH).to(dtype)
    with torch.no_grad():
        return layer(x) - (0 if layer.shared is None else layer.shared(x))


def check(model: nn.Module, old: list[nn.Module]) -> None:
    """The routers hold the experts of their layers and nothing of others: where these are zero, so is the output."""
    gone = {id(tensor) for experts in old for tensor in tensors_in_reach(experts)}
    assert layers(model)
    for layer in layers(model).values():
        assert gone.isdisjoint(id(tensor) for tensor in tensors_in_reach(layer.router))
        for part in layer.router.modules():
            assert all(held is layer.experts for held in getattr(part, "_experts", ()))
        assert output_of_experts(layer).abs().max() > 0
        for tensor in layer.experts.state_dict().values():
            if tensor.is_floating_point():  # the scales, of quantised experts
                tensor.zero_()
        assert output_of_experts(layer).abs().max() == 0


def test_these_routers_hold_experts():
    assert set(HOLDERS) == {Arrow, Compete, DefaultVector, MoLE}


@pytest.mark.parametrize("around", [None, Capacity, SharedRouting])
@pytest.mark.parametrize("holder", READS_NETWORKS)
def test_quantised_experts(holder, around):
    if around is Capacity and holder is DefaultVector:
        holder = Compete  # rows that are dropped have no default output
    router = holder if around is None else lambda width, num_experts: around(holder(width, num_experts))
    model = made(router, "networks")
    old = experts_of(model)
    check(quantize_experts(model), old)


@pytest.mark.skipif(cpp.why_not() is not None, reason="there is no C++ kernel here")
@pytest.mark.parametrize("holder", READS_NETWORKS)
def test_quantised_experts_of_a_fast_decoder(holder):
    model = made(holder, "networks")
    old = experts_of(model)
    check(fast_decode(model, bits=8), old)


@pytest.mark.parametrize("holder", READS_NETWORKS)
def test_baked_experts(holder):
    model = made(holder, "changes of a network")
    old = experts_of(model)
    check(merge_into_experts(model), old)


@pytest.mark.parametrize("holder", HOLDERS)
def test_adapters_that_were_merged(holder):
    model = made(holder, "adapters")
    old = experts_of(model)
    check(combine_adapters(model), old)


@pytest.mark.parametrize("holder", HOLDERS)
def test_adapters_of_a_search_that_failed(holder):
    pytest.importorskip("nevergrad")
    model = made(holder, "adapters")
    with pytest.raises(ValueError, match="the loss is nan"):
        combine_adapters_by_search(model, lambda model: float("nan"), budget=2)
    assert all(type(layer.router) is holder for layer in layers(model).values())
    check(model, [])


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickled"])
def test_a_copy_of_a_model(copied, holder):
    model = made(holder, "adapters")
    old = experts_of(model)
    check(copied(model), old)
    for layer in layers(model).values():
        assert output_of_experts(layer).abs().max() > 0


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_copied_router_is_put_into_another_layer(holder):
    first, second = (next(iter(layers(made(holder, "adapters")).values())) for _ in range(2))
    copied = deepcopy(first.router)
    assert len({id(tensor) for tensor in tensors_in_reach(copied)}) <= len([*copied.parameters(), *copied.buffers()])
    second.replace(router=copied)
    check(nn.Sequential(second), [first.experts])


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype(holder, dtype):
    model = made(holder, "adapters").to(dtype)
    for layer in layers(model).values():
        floats = {t.dtype for part in layer.router._experts for t in part.parameters()}
        assert floats == {dtype}
    check(model, [])


@pytest.mark.parametrize("holder", [Compete, DefaultVector])
def test_another_device(holder):
    with torch.device("meta"):
        layer = MoE(holder(WIDTH, 3), FFN(3, WIDTH, 8)).eval()
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for buffer in layer.buffers():
        buffer.zero_()
    check(nn.Sequential(layer), [])


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_replayed_decision_gives_the_router_back(holder):
    model = made(holder, "adapters")
    before = [layer.router for layer in layers(model).values()]
    with record(model) as decisions, torch.no_grad():
        model(**inputs(model))
    with replay(model, decisions), torch.no_grad():
        model(**inputs(model))
    assert all(layer.router is router for layer, router in zip(layers(model).values(), before, strict=True))
    check(model, [])


def test_a_layer_is_as_it_was_where_the_router_cannot_work_with_the_experts():
    layer = MoE(TopK(WIDTH, 3), FFN(3, WIDTH, 8))
    router, experts = layer.router, layer.experts
    with pytest.raises(ValueError, match="Arrow"):
        layer.replace(router=Arrow(WIDTH, 3))
    assert layer.router is router
    assert layer.experts is experts
