"""`Backend`, an implementation of a sparse layer, and predicates with which backends reject unsupported calls.

A predicate `needs_...` returns None if its requirement is met, else the reason. Backends combine them with `or`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.kernels.naive import is_transformed
from moeify.routing import Assignment, Routing


@dataclass(frozen=True)
class Backend:
    """An implementation of a sparse layer.

    Attributes:
        run: computes the output of the layer.
        refuse: returns the reason why this backend does not support a call, None if it does.
        chosen: returns whether `auto` uses this backend for a call that it supports.
    """

    run: Callable[[Tensor, Routing, Experts], Tensor]
    refuse: Callable[[Tensor, Routing, Experts], str | None]
    chosen: Callable[[Tensor, Routing, Experts], bool]


def needs_cpu(x: Tensor) -> str | None:
    """Tokens on a CPU."""
    return None if x.device.type == "cpu" else f"it runs on a CPU, and the tokens are on {x.device.type}"


def needs_nvidia(x: Tensor) -> str | None:
    """Tokens on an NVIDIA GPU."""
    return None if x.is_cuda else f"it runs on NVIDIA GPUs, and the tokens are on {x.device.type!r}"


def needs_one_weight(routing: Routing) -> str | None:
    """A routing decision of type `Assignment` with one top-k weight per row, which multiplies its expert output."""
    if not isinstance(routing, Assignment):
        return f"it needs an Assignment, and the router gave a {type(routing).__name__}"
    if routing.input_weight is not None:
        return "it weights expert outputs, and this router weights what the experts read"
    return "it needs one weight per row, and the router gave several gates" if routing.has_gate_axis else None


def sparse(routing: Routing) -> Assignment:
    """The routing decision of a call that meets `needs_one_weight`, typed as an `Assignment`."""
    assert isinstance(routing, Assignment)
    return routing


def needs_rows_only(routing: Routing) -> str | None:
    """A routing decision without a default output: the layer's output is the weighted sum of expert outputs."""
    if getattr(routing, "default_output", None) is not None:
        return "it adds up rows only, and this router adds a default output to every token"
    return None


def needs_all_choices(routing: Routing) -> str | None:
    """A routing decision in which every token is assigned to all its top-K experts, without padding or drops."""
    if not isinstance(routing, Assignment) or routing.choices is None:
        return "it needs the same number of experts for every token"
    if not routing.has_all_rows:
        return "it needs every row of every token, and some are padding or were dropped"
    if routing.is_limited:
        return "it reads the experts that every token chose, and a capacity has moved some tokens to others"
    return None


def needs_stacked(experts: Experts) -> str | None:
    """Feed-forward experts whose weights are stacked, in their current mode (training or evaluation)."""
    if experts.stacked is None:
        found = type(experts).__name__
        return (
            "it needs stacked weights of feed-forward networks of one size, without dropout and with an activation "
            f"without parameters, and these are {found}"
        )
    return None


def needs_weights(x: Tensor, experts: Experts, tensors: Iterable[Tensor | None]) -> str | None:
    """Weights that a backend may read directly, without calling the modules that own them.

    Hooks on these modules would not run, nor would a replaced `forward`, with which offloading loads weights.

    Args:
        x: the tokens.
        experts: the experts.
        tensors: the tensors of the experts that the backend reads.
    """
    if any(waits_for_call(module) for module in experts.called_modules()):
        return (
            "it reads the experts' weights without calling the experts, so their hooks, or a forward that was "
            "replaced, would not run"
        )
    for tensor in (x, *tensors):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it reads tensors that lie whole in memory, and one is a {type(tensor).__name__}"
        if tensor.device != x.device:
            return f"it reads weights where the tokens are, on {x.device}, and some are on {tensor.device}"
    return None


def waits_for_call(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced `forward`, which would not run if its weights are read directly."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or has_other_forward(module)
    )


def has_other_forward(module: nn.Module) -> bool:
    """Whether the `forward` of an instance was replaced by another than that of its class."""
    if "forward" not in module.__dict__:
        return False
    return getattr(module.__dict__["forward"], "__func__", None) is not type(module).forward


def needs_no_transform() -> str | None:
    """No transform of `torch.func`, and no derivative in forward mode."""
    return "it does not support transforms of torch.func, nor forward mode" if is_transformed() else None


def needs_no_autocast(x: Tensor) -> str | None:
    """No autocast on the tokens' device."""
    return "it does not support autocast" if torch.is_autocast_enabled(x.device.type) else None


def needs_dtype(x: Tensor, dtypes: Sequence[torch.dtype], weights: Iterable[Tensor | None] = ()) -> str | None:
    """Tokens in one of the dtypes, and weights in the dtype of the tokens."""
    if x.dtype not in dtypes:
        return f"it computes in {', '.join(map(_short, dtypes))}, and the tokens are {x.dtype}"
    other = next((weight.dtype for weight in weights if weight is not None and weight.dtype != x.dtype), None)
    return None if other is None else f"it needs one dtype, and the tokens are {x.dtype} and the experts {other}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def needs_no_gradient(tensors: Iterable[Tensor | None]) -> str | None:
    """No gradient needed: gradients are disabled, or no tensor requires one."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "it has no gradient, and one is needed; call it under torch.no_grad()"
    return None
