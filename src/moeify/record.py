"""See every routing decision of a model, in sparse layers of ours and in the MoE models that transformers ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.context import Context, recomputing
from moeify.moe import MoE
from moeify.routing import Assignment, Routing, assign

Observer = Callable[[str, Routing], None]
_EXPERTS_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


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


def observe(model: nn.Module, observer: Observer) -> list[RemovableHandle]:
    """Call `observer(layer name, decision)` for every decision until the returned handles are removed.

    Raises:
        ValueError: the model has no sparse layer.
    """
    handles = [
        moe.router.register_forward_hook(_observe_router(name, observer))
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
                handles.append(router.register_forward_hook(_keep_logits(latest)))
            handles.append(
                experts.register_forward_pre_hook(_observe_native(name, latest, context, observer), with_kwargs=True)
            )
    if not handles:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer to record; make it sparse with moeify.sparsify, or pass a "
            "mixture-of-experts model of transformers"
        )
    return handles


def _observe_router(name: str, observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, routing: Routing) -> None:
        if not recomputing():
            observer(name, routing)

    return hook


def native_layers(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module | None, nn.Module]]]:
    """Name, router and experts of every MoE layer that is transformers' own.

    Experts are recognised by what they hold, stacked weights `down_proj (E, ., .)`; the router is the sibling with a
    weight or a linear map of E rows.
    """
    ours = {id(part) for moe in model.modules() if isinstance(moe, MoE) for part in moe.modules()}
    for name, block in model.named_modules():
        for experts in block.children():
            if id(experts) not in ours and (num_experts := stacked_experts(experts)):
                router = next((m for m in block.children() if m is not experts and _routes(m, num_experts)), None)
                yield name, (router, experts)


def stacked_experts(module: nn.Module) -> int:
    """The number of experts that a module of transformers holds in stacked weights, 0 if it holds none."""
    down = module._parameters.get("down_proj")
    has_up = any(name in module._parameters for name in ("gate_up_proj", "up_proj"))
    return down.shape[0] if down is not None and down.dim() == 3 and has_up else 0


def _routes(module: nn.Module, num_experts: int) -> bool:
    return any(p.dim() == 2 and p.shape[0] == num_experts for p in module.parameters())


def _keep_logits(latest: dict[str, Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        latest["logits"] = output[0] if isinstance(output, tuple) else output

    return hook


def _observe_native(name: str, latest: dict[str, Tensor], context: Context, observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if recomputing():
            return
        given = dict(zip(_EXPERTS_ARGUMENTS, args, strict=False)) | kwargs
        index, gates = _choices(given)
        observer(name, native_routing(index, gates, stacked_experts(module), latest.pop("logits", None), context))

    return hook


def _choices(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Index and weights among the arguments of native experts: families call them by different names."""
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    index = next(t for t in tensors if not t.is_floating_point())
    gates = next(t for t in tensors if t.is_floating_point() and t.shape == index.shape)
    return index, gates


def native_routing(
    index: Tensor, gates: Tensor, num_experts: int, logits: Tensor | None, context: Context
) -> Assignment:
    """The decision of a native layer, without padding, as our losses, controllers and statistics read it."""
    tokens = index.shape[0]
    positions = context.real(tokens)
    group = context.groups([tokens]).to(index.device)
    if logits is not None and logits.shape[-1] != num_experts:
        logits = None
    if logits is not None:
        logits = logits.reshape(-1, num_experts).float()
    if positions is not None:
        index, gates, group = index[positions], gates[positions], group[positions]
        logits = None if logits is None else logits[positions]
    return assign(
        index, gates, num_experts,
        shape=(tokens,),
        positions=positions,
        logits=logits,
        scores=None if logits is None else infer_scores(logits, index, gates),
        group=group,
    )  # fmt: skip


_SCORES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda z: z.softmax(-1),
    lambda z: z.sigmoid(),
    lambda z: torch.nn.functional.softplus(z).sqrt(),
)


def infer_scores(logits: Tensor, index: Tensor, gates: Tensor) -> Tensor:
    """Scores by the score function that explains the weights best: they are proportional to the chosen scores."""
    with torch.no_grad():
        errors = []
        for score in _SCORES:
            chosen = score(logits).gather(-1, index)
            expected = chosen / chosen.sum(-1, keepdim=True)
            given = gates.float() / gates.float().sum(-1, keepdim=True)
            errors.append((expected - given).abs().sum().item())
    return _SCORES[errors.index(min(errors))](logits)
