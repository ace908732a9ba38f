"""Record the routing decisions of a model, made by moeify or shipped by transformers, and replay them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from moeify.layers import moe_layers, sparse_layers, watch_inputs
from moeify.routers import Replay
from moeify.routing import Routing

Observer = Callable[[str, Routing], None]


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Collect the latest decision of every sparse layer, by the layer's name.

    An MoE block of transformers is named by the module that holds its router and experts. Forward passes that
    activation checkpointing repeats are not recorded again. Of a model that several threads call, the decisions are
    those of this thread; only where it does not call the model, those of the thread that called it last.

    Raises:
        ValueError: the model has no sparse layer.
    """
    decisions: dict[str, Routing] = {}
    handles = observe(model, _keep_one_thread(decisions))
    try:
        yield decisions
    finally:
        for handle in handles:
            handle.remove()


def _keep_one_thread(decisions: dict[str, Routing]) -> Observer:
    """What puts decisions into a dict that never holds those of two threads."""
    threads = threading.local()  # `threading.get_ident` does not compile
    own = latest = threads.current = object()

    def keep(name: str, routing: Routing) -> None:
        nonlocal latest
        current = getattr(threads, "current", None)
        if current is None:
            current = threads.current = object()
        if current is not latest:
            if latest is own and decisions:
                return
            decisions.clear()
            latest = current
        decisions[name] = routing

    return keep


def observe(model: nn.Module, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
    """Call `observer(layer name, decision)` for every decision until the returned handles are removed.

    Args:
        model: a model with sparse layers, made by moeify or those of transformers.
        observer: what is called.
        repeated: also for the forward passes that activation checkpointing repeats.

    Raises:
        ValueError: the model has no sparse layer.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer to record; make it sparse with moeify.sparsify, or pass a "
            "mixture-of-experts model of transformers"
        )
    handles = watch_inputs(model, layers)
    for name, layer in layers.items():
        handles += layer.observe(partial(observer, name), repeated=repeated)
    return handles


@contextmanager
def replay(
    model: nn.Module, *decisions: dict[str, Routing], weights: Literal["recorded", "recomputed"] = "recorded"
) -> Iterator[None]:
    """Route every `MoE` as was recorded, one dict of `record` per forward pass.

    With activation checkpointing, run the backward pass inside as well: it repeats the forward pass.

    Args:
        model: the model, or one whose layers have the same names.
        decisions: what `record` collected, in the order of the forward passes.
        weights: `recorded`, or `recomputed` from the router's current scores, see `moeify.routers.Replay`.

    Raises:
        ValueError: the model has no `MoE`, or one of which nothing was recorded.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer of moeify whose decisions could be replayed")
    if missing := [name for name in layers if any(name not in recorded for recorded in decisions)]:
        raise ValueError(f"no decision was recorded for {', '.join(missing)}; run a whole forward pass under record()")
    routers = {name: moe.router for name, moe in layers.items()}
    replays = {
        name: Replay(router, [recorded[name] for recorded in decisions], weights=weights)
        for name, router in routers.items()
    }
    try:
        for name, moe in layers.items():
            moe.replace(router=replays[name])
        yield
    finally:
        for name, moe in layers.items():
            moe.replace(router=routers[name])
