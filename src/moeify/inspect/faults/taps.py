"""Hooks on the logits, the choices and the weights of a sparse layer, of moeify or of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.hf.blocks import InterfaceBlock
from moeify.hf.decisions import choices, is_observed
from moeify.inspect.faults.finding import Unknown
from moeify.layers import HfLayer, SparseLayer
from moeify.routing import Assignment

See = Callable[[Float[Tensor, "T E"], Int[Tensor, "T K"]], None]


def require_taps(layer: SparseLayer) -> None:
    """Refuse a layer whose logits and weights hooks cannot access.

    Raises:
        Unknown: a block of transformers without a router of its own, or that calls its experts in another way.
    """
    if isinstance(layer, HfLayer) and (type(layer.block) is not InterfaceBlock or layer.router is None):
        raise Unknown(f"{type(layer.module).__name__} calls its experts in a way that hooks cannot access")


def watch(layer: SparseLayer, see: See) -> list[RemovableHandle]:
    """Call `see` with the logits, as part of the autograd graph, and the choices of every pass.

    In blocks of transformers these include padding; in layers of moeify they do not.
    """
    if not isinstance(layer, HfLayer):

        def decided(router: nn.Module, args: tuple, routing: Any) -> None:
            if isinstance(routing, Assignment) and routing.logits is not None and routing.choices is not None:
                see(routing.logits, routing.choices.indices)

        return [_router(layer).register_forward_hook(decided)]
    latest: list[Tensor] = []

    def scored(router: nn.Module, args: tuple, output: Any) -> None:
        latest[:] = [output[0] if isinstance(output, tuple) else output]

    def chosen(experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if latest and is_observed():
            see(latest.pop(), choices((*args, *kwargs.values()))[0])

    hooked = layer.experts.register_forward_pre_hook(chosen, with_kwargs=True)
    return [_router(layer).register_forward_hook(scored), hooked]


def detach_weights(layer: SparseLayer) -> RemovableHandle:
    """Detach the weights of the rows, through which the task loss reaches the router.

    The gradient that the logits still get comes from auxiliary losses.
    """
    if not isinstance(layer, HfLayer):
        return _router(layer).register_forward_hook(_detached_decision)

    def cut(experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        _, weights = choices((*args, *kwargs.values()))

        def without(value: Any) -> Any:
            return value.detach() if value is weights else value

        return tuple(map(without, args)), {name: without(value) for name, value in kwargs.items()}

    return layer.experts.register_forward_pre_hook(cut, with_kwargs=True)


def _detached_decision(router: nn.Module, args: tuple, routing: Any) -> Any:
    return replace(routing, weight=routing.weight.detach()) if isinstance(routing, Assignment) else routing


def _router(layer: SparseLayer) -> nn.Module:
    if layer.router is None:
        raise Unknown(f"{type(layer.module).__name__} has no router of its own")
    return layer.router
