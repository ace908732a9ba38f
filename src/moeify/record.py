"""See every routing decision of a model, ours or one that transformers ships, and give decisions back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.context import Context, recomputing
from moeify.moe import MoE
from moeify.routers import Replay, sigmoid, softmax, sqrt_softplus
from moeify.routing import Assignment, Evidence, Routing, assign

Observer = Callable[[str, Routing], None]
_EXPERTS_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
_looking_away: ContextVar[bool] = ContextVar("looking_away", default=False)


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Collect the latest decision of every sparse layer, by the layer's name.

    A native layer of transformers is named by the module that holds its router and experts. Forward passes that
    activation checkpointing repeats are not recorded again.

    Raises:
        ValueError: the model has no sparse layer.
    """
    decisions: dict[str, Routing] = {}
    handles = observe(model, decisions.__setitem__)
    try:
        yield decisions
    finally:
        for handle in handles:
            handle.remove()


def observe(model: nn.Module, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
    """Call `observer(layer name, decision)` for every decision until the returned handles are removed.

    Args:
        model: a model with sparse layers, ours or native ones.
        observer: what is called.
        repeated: also for the forward passes that activation checkpointing repeats.

    Raises:
        ValueError: the model has no sparse layer.
    """
    handles = [
        moe.router.register_forward_hook(_observe_router(name, observer, repeated))
        for name, moe in model.named_modules()
        if isinstance(moe, MoE)
    ]
    native = dict(native_layers(model))
    if native:
        context = Context()
        handles += context.watch([model])
        for name, (router, experts) in native.items():
            latest: dict[str, Tensor] = {}
            if router is not None:
                handles.append(router.register_forward_hook(_keep_logits(latest, repeated)))
            hook = _observe_native(name, latest, context, observer, repeated)
            handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
    if not handles:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer to record; make it sparse with moeify.sparsify, or pass a "
            "mixture-of-experts model of transformers"
        )
    return handles


@contextmanager
def replay(
    model: nn.Module, *decisions: dict[str, Routing], weights: Literal["recorded", "recomputed"] = "recorded"
) -> Iterator[None]:
    """Route every sparse layer of ours as was recorded, one dict of `record` per forward pass.

    With activation checkpointing, run the backward pass inside as well: it repeats the forward pass.

    Args:
        model: the model, or one whose layers have the same names.
        decisions: what `record` collected, in the order of the forward passes.
        weights: `recorded`, or `recomputed` from the router's scores of today, see `moeify.routers.Replay`.

    Raises:
        ValueError: the model has no sparse layer of ours, or one of which nothing was recorded.
    """
    layers = {name: moe for name, moe in model.named_modules() if isinstance(moe, MoE)}
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


@contextmanager
def looking_away() -> Iterator[None]:
    """Call experts of transformers without anything being recorded, for no router has decided it."""
    before = _looking_away.set(True)
    try:
        yield
    finally:
        _looking_away.reset(before)


def _observe_router(name: str, observer: Observer, repeated: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, routing: Routing) -> None:
        if repeated or not recomputing():
            with _apart():
                observer(name, routing)

    return hook


def _apart() -> AbstractContextManager[None]:
    """Compute beside a layer that activation checkpointing repeats: observers have no part in the repetition."""
    return torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)


def native_layers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module | None, nn.Module]]]:
    """Name, router and experts of every MoE layer that is transformers' own.

    Experts are recognised by what they hold, stacked weights `down_proj (E, ., .)`, and by what they are called with,
    tokens, choices and weights; the router is the sibling with a weight or a linear map of E rows.
    """
    ours = {id(part) for moe in model.modules() if isinstance(moe, MoE) for part in moe.modules()}
    for name, block in model.named_modules():
        for experts in block.children():
            if id(experts) not in ours and (num_experts := stacked_experts(experts)) and _takes_choices(experts):
                router = next((m for m in block.children() if m is not experts and _routes(m, num_experts)), None)
                yield name, (router, experts)


def stacked_experts(module: nn.Module) -> int:
    """The number of experts that a module of transformers stacks, zero experts included, 0 if it stacks none."""
    down = module._parameters.get("down_proj")
    up = next((module._parameters[name] for name in ("gate_up_proj", "up_proj") if name in module._parameters), None)
    return up.shape[0] if up is not None and down is not None and down.dim() == 3 else 0


def _takes_choices(experts: nn.Module) -> bool:
    return len(inspect.signature(experts.forward).parameters) >= len(_EXPERTS_ARGUMENTS)


def _routes(module: nn.Module, num_experts: int) -> bool:
    return any(p.dim() == 2 and p.shape[0] == num_experts for p in module.parameters())


def _keep_logits(latest: dict[str, Tensor], repeated: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        if repeated or not recomputing():
            latest["logits"] = output[0] if isinstance(output, tuple) else output

    return hook


def _observe_native(
    name: str, latest: dict[str, Tensor], context: Context, observer: Observer, repeated: bool
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (recomputing() and not repeated) or _looking_away.get():
            return
        index, gates = choices((*args, *kwargs.values()))
        with _apart():
            observer(name, native_routing(index, gates, stacked_experts(module), latest.pop("logits", None), context))

    return hook


def choices(arguments: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Index and weights among the arguments of native experts: families call them by different names."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    index = next(t for t in tensors if not t.is_floating_point())
    gates = next(t for t in tensors if t.is_floating_point() and t.shape == index.shape)
    return index, gates


def native_routing(
    index: Int[Tensor, "N K"],
    gates: Float[Tensor, "N K"],
    num_experts: int,
    output: Float[Tensor, "... E"] | None,
    context: Context,
) -> Assignment:
    """The decision of a native layer, without padding, as our losses, controllers and statistics read it.

    Args:
        index: the experts that were called for each token.
        gates: their weights.
        num_experts: E.
        output: what the router returned first, logits or probabilities, if it did.
        context: which tokens are real.
    """
    tokens = index.shape[0]
    positions = context.real(tokens)
    group = context.sequence_ids([tokens]).to(index.device)
    if output is not None:
        output = output.reshape(tokens, -1).float() if output.shape[-1] == num_experts else None
    if positions is not None:
        index, gates, group = index[positions], gates[positions], group[positions]
        output = None if output is None else output[positions]
    logits, scores = (None, None) if output is None else logits_and_scores(output, index, gates)
    return assign(
        index, gates, num_experts,
        shape=(tokens,), positions=positions, evidence=Evidence(logits=logits, scores=scores, sequence_id=group),
    )  # fmt: skip


def logits_and_scores(
    output: Float[Tensor, "T E"], index: Int[Tensor, "T K"], gates: Float[Tensor, "T K"]
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
    """What a router's first output must have been, and the scores that its weights come from.

    The score function is the one that explains the weights best, for they are proportional to the chosen scores. An
    output that is a probability already (Gemma 4) has its logarithm as logits.
    """
    with torch.no_grad():
        errors = [_misfit(score(output).gather(-1, index), gates.float()) for score in _SCORES]
        probable = (output >= 0).all() & ((output.sum(-1) - 1).abs() < 1e-3).all()
        best = int(torch.stack([torch.where(probable, -1.0, torch.inf), *errors]).argmin())
    if best == 0:
        return output.clamp_min(torch.finfo(output.dtype).tiny).log(), output
    return output, _SCORES[best - 1](output)


_SCORES = (softmax, sigmoid, sqrt_softplus)


def _misfit(chosen: Float[Tensor, "T K"], gates: Float[Tensor, "T K"]) -> Float[Tensor, ""]:
    return (chosen / chosen.sum(-1, keepdim=True) - gates / gates.sum(-1, keepdim=True)).abs().sum()
