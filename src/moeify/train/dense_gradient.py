"""DenseMixer: in training every expert runs, so that the router learns from experts that it did not choose as well.

A router's gradient comes from the experts of its choice alone. DenseMixer (Yao et al. 2025,
github.com/yaof20/DenseMixer) leaves the output y as it is, and gives the router a gradient from every expert:

    y = Σ_{j in top k} g_j E_j(x)  +  Σ_{other j} (w_j - sg(w_j)) sg(E_j(x)),        w_j = s_j · sg(Σ g / Σ_{top k} s)

with the scores s, the weights g of the chosen experts, and sg() the value without a gradient. The second sum is 0. The
factor of w_j divides by the sum of the chosen scores where the router does, and is the router's scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.hf.blocks import InterfaceBlock
from moeify.hf.decisions import choices, unobserved
from moeify.layers import HfLayer, MoELayer, SparseLayer, sparse_layers, watch_inputs
from moeify.routing import Assignment, Routing, assign


@contextmanager
def dense_router_gradient(model: nn.Module) -> Iterator[None]:
    """Context manager in which routers learn from all experts, chosen or not (DenseMixer), in training.

        with dense_router_gradient(model):
            SparseTrainer(model, arguments, train_dataset=data).train()

    Outputs, and the gradients of experts and tokens, stay as they are. Each step costs one more forward pass of every
    expert on the tokens that were not routed to it. In evaluation, and without gradients, nothing more is computed.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.

    Raises:
        ValueError: the model has no sparse layer, or a block of transformers that does not call its experts with chosen
            tokens; in the forward pass, a router without scores, or with another number of experts for every token.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer, so it has no router to train")
    handles = watch_inputs(model, layers)
    try:
        for layer in layers.values():
            handles += _hooks(layer)
        yield
    finally:
        for handle in handles:
            handle.remove()


def other_experts(routing: Routing, name: str) -> tuple[Int[Tensor, "T E-K"], Float[Tensor, "T E-K"]]:
    """The experts that each token did not choose, and their weights w.

    Raises:
        ValueError: a router without scores, or with another number of experts for every token.
    """
    chosen, scores = getattr(routing, "choices", None), routing.scores
    if chosen is None or scores is None or len(scores) != len(chosen.indices) or chosen.weights.dim() > 2:
        raise ValueError(
            f"the router of {name} gives no scores of all experts with k choices for every token, so DenseMixer cannot "
            "weight the others; use a token-choice router such as TopK"
        )
    picked = scores.gather(-1, chosen.indices)
    scale = (chosen.weights.sum(-1, keepdim=True) / picked.sum(-1, keepdim=True)).detach()
    is_other = torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen.indices, False)
    others = is_other.nonzero()[:, 1].view(len(scores), -1)
    return others, scores.gather(-1, others) * scale


def _hooks(layer: SparseLayer) -> list[RemovableHandle]:
    if isinstance(layer, MoELayer):
        return [layer.router.register_forward_hook(partial(_after_router, layer))]
    assert isinstance(layer, HfLayer)
    if type(layer.block) is not InterfaceBlock:
        raise ValueError(
            f"{layer.name or type(layer.module).__name__} does not call its experts with chosen tokens, so DenseMixer "
            "cannot run the others"
        )
    latest: list[Routing] = []
    handles = layer.observe(lambda routing: latest.__setitem__(slice(None), [routing]), repeated=True)
    after = partial(_after_experts, layer, latest)
    return [*handles, layer.experts.register_forward_hook(after, with_kwargs=True)]


def _is_needed(layer: SparseLayer) -> bool:
    return layer.module.training and torch.is_grad_enabled()


def _after_router(layer: MoELayer, router: nn.Module, args: tuple, routing: Routing) -> Routing | None:
    """Add the second sum to the decision, as a default output."""
    if not _is_needed(layer):
        return None
    others, weights = other_experts(routing, layer.name)
    assert isinstance(routing, Assignment)
    positions = layer.context.real(args[0].shape[:-1].numel())
    weights = weights - weights.detach()
    rest = assign(others, weights, layer.num_experts, shape=routing.shape, positions=positions)
    with torch.no_grad():
        outputs = layer.experts(rest.dispatch(args[0]), rest.counts)
    second = rest.combine(outputs.float()).flatten(0, -2)
    before = routing.default_output
    return replace(routing, default_output=second if before is None else before + second)


def _after_experts(
    layer: HfLayer, latest: list[Routing], experts: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """Add the second sum to the output of transformers' experts, called once for each place among the others."""
    if not _is_needed(layer) or not latest:
        return None
    others, weights = other_experts(latest.pop(), layer.name)
    index, given = choices((*args, *kwargs.values()))
    positions = layer.context.real(len(index))
    positions = torch.arange(len(index), device=index.device) if positions is None else positions
    second = output.new_zeros(len(index), output.shape[-1], dtype=torch.float32)

    def at(place: int, value: Any) -> Any:
        if value is index:
            return others[:, place : place + 1]
        if value is given:
            return torch.ones_like(given[positions, :1])
        return value[positions] if isinstance(value, Tensor) else value

    for place in range(others.shape[1]):
        with torch.no_grad(), unobserved():
            found = experts(*(at(place, v) for v in args), **{name: at(place, v) for name, v in kwargs.items()})
        weight = weights[:, place : place + 1]
        second = second.index_add(0, positions, (weight - weight.detach()) * found.float())
    return output + second.view(output.shape).to(output.dtype)
