"""Initialise routers from a few examples (prompts) per expert, before any training; send all tokens to one expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.find.probe import as_probe
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers.base import Router, real_tokens
from moeify.routing import Assignment, Routing


def expert_names(model: nn.Module) -> list[str]:
    """The names of a merged model's experts, in their order.

    Raises:
        ValueError: the model was not made by `merge_models`.
    """
    names = getattr(getattr(Origin.of(model).recipe, "experts", None), "keywords", {}).get("names")
    if names is None:
        raise ValueError(f"the experts of this {type(model).__name__} have no names; merge_models gives them names")
    return list(names)


@contextmanager
def route_all_to(model: nn.Module, expert: int | str) -> Iterator[None]:
    """Send every real token to one expert, by number or by name, with weight 1; no router decides.

    Raises:
        ValueError: no such expert, or no sparse layer at all.
    """
    layers = _layers(model)
    known: list[int | str] = list(range(layers[0].experts.num_experts))
    if isinstance(expert, str):
        known = [*expert_names(model)]
    if expert not in known:
        raise ValueError(f"there is no expert {expert!r}; there are: {', '.join(map(str, known))}")
    e = known.index(expert)

    def only(router: nn.Module, args: tuple[Tensor, Context], decision: Routing) -> Assignment:
        tokens = real_tokens(*args)
        index = torch.full((len(tokens.x), 1), e, device=tokens.x.device)
        return tokens.assign(index, torch.ones_like(index, dtype=torch.float32), decision.counts.numel())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.router.register_forward_hook(only).remove)
        yield


@torch.no_grad()
def route_by_examples(model: nn.Module, examples: Mapping[str, Sequence[Any]]) -> None:
    """Initialise the row of every expert in every router from examples of the expert's domain:

        m_e = mean of what the router reads, over all tokens of the examples of e, while all go through expert e
        c   = mean of m_e over the experts
        w_e = m_e - c without its part along c, scaled to length 1

    This is mergekit-moe's `hidden_avg` mode with three differences: the router's own input is averaged, behind the norm
    and without padding; a domain's tokens pass through the experts that they will be routed to; and the component that
    all domains share is removed, so that the mean token has a logit of 0 with every expert.

    Args:
        model: what `merge_models` returned.
        examples: for the name of every expert some inputs of the model: tensors, tuples of arguments or mappings.

    Raises:
        ValueError: a name without examples; a router without a row per expert; domains with the same mean input of a
            router.
    """
    names = expert_names(model)
    for name in names:
        if not isinstance(examples.get(name), list | tuple) or not examples[name]:
            raise ValueError(f"there is no example for the expert {name!r}; give a list of inputs for every expert")
    rows = {layer: _rows(layer) for layer in _layers(model)}
    means = [mean_inputs(model, e, list(rows), examples[name]) for e, name in enumerate(names)]
    for layer, weight in rows.items():
        mean = torch.stack([of_expert[layer] for of_expert in means])  # (E, D)
        common = mean.mean(0, keepdim=True)
        away = mean - common
        away = away - away @ F.normalize(common).T * F.normalize(common)
        if (away.norm(dim=-1) <= 1e-5 * common.norm()).any():  # rounding
            raise ValueError(f"the examples look alike to the router of {layer.name}; give others, or more of them")
        weight.copy_(F.normalize(away))


def _layers(model: nn.Module) -> list[MoE]:
    layers = list(moe_layers(model).values())
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no sparse layer; make one with merge_models or sparsify")
    return layers


def _rows(layer: MoE) -> nn.Parameter:
    """The parameter of a router that holds a row per expert."""
    for part in layer.router.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, Router) and isinstance(weight, nn.Parameter) and len(weight) == layer.experts.num_experts:
            return weight
    raise ValueError(
        f"{type(layer.router).__name__} has no weight with a row per expert that examples could set; use TopK, or "
        "train the routers with everything else frozen"
    )


def mean_inputs(model: nn.Module, e: int, layers: list[MoE], examples: Sequence[Any]) -> dict[MoE, Float[Tensor, "D"]]:
    """The mean of what the router of each layer reads, over all real tokens of examples that all go through expert e.

    Raises:
        ValueError: no such expert; examples that do not reach a layer.
    """
    totals: dict[nn.Module, Tensor] = {}
    tokens: dict[nn.Module, int] = {}

    def add(router: nn.Module, args: tuple[Tensor, Context]) -> None:
        x = real_tokens(*args).x.float()
        totals[router] = totals.get(router, 0) + x.sum(0)
        tokens[router] = tokens.get(router, 0) + len(x)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.router.register_forward_pre_hook(add).remove)
        hooks.enter_context(route_all_to(model, e))
        for example in examples:
            as_probe(example).run(model)
    for layer in layers:
        if layer.router not in totals:
            raise ValueError(f"the examples do not reach {layer.name}; give inputs that every part of the model reads")
    return {layer: totals[layer.router] / tokens[layer.router] for layer in layers}
