"""Detect NaN and infinity before they reach the weights, and name the module that they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moeify.moe import passing_nonfinite
from moeify.ranks import all_reduce, anywhere
from moeify.routers.lookup import split_router_inputs


def is_finite(losses: Sequence[Tensor], model: nn.Module, *, gradients: bool = True) -> bool:
    """Whether the losses of a step and its gradients are finite on every rank; all ranks get the same result.

    Args:
        losses: of the micro-batches of the step.
        model: after backward, before the optimizer's step.
        gradients: False if a gradient scaler deals with infinite gradients itself (fp16).
    """
    values = [loss.detach().float().reshape(1) for loss in losses]
    if gradients:
        values += [norm.float().reshape(1) for norm in _norms(_local(p.grad) for p in model.parameters())]
    device = values[0].device
    bad = (~torch.isfinite(torch.cat([value.to(device) for value in values]))).any().float()
    return not bool(all_reduce(bad))


def find_nonfinite(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, sharded: bool = False) -> str:
    """Name what is not finite: the first module in a forward pass, or else the first parameter with such a gradient.

    Runs the batches through the model once more; call it once the training has failed.

    Args:
        model: the model.
        batches: of this rank in the failed step.
        sharded: over ranks, which then all call this, with equally many batches, and look at the same things.
    """

    def of_any_rank(found: str | None) -> str | None:
        if sharded and anywhere(found is not None, device) and found is None:
            return "a value of another process, which names it,"
        return found

    device = next(model.parameters()).device
    weights = ((name, p.detach()) for name, p in model.named_parameters())
    if found := of_any_rank(_first(weights, "the weights of")):
        return found
    for batch in batches:
        with passing_nonfinite() if sharded else nullcontext():
            name = _first_module(model, batch)
        if found := of_any_rank(f"the output of {name}" if name else None):
            return found
    gradients = ((name, p.grad) for name, p in model.named_parameters())
    found = of_any_rank(_first(gradients, "the gradient of"))
    return found or "the norm of all gradients, though each of them is finite"


def _first(tensors: Iterable[tuple[str, Tensor | None]], what: str) -> str | None:
    bad = (name for name, tensor in tensors if tensor is not None and not torch.isfinite(_local(tensor)).all())
    name = next(bad, None)
    return None if name is None else f"{what} {name}"


def _norms(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    present = [gradient for gradient in gradients if gradient is not None]
    by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in present:
        by_device.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return [torch.stack(torch._foreach_norm(group)).norm() for group in by_device.values()]


def _local(tensor: Tensor | None) -> Any:
    """The local part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _first_module(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple, output: Any) -> None:
            if not found and not all(map(_is_finite, _tensors(output))) and all(map(_is_finite, _tensors(args))):
                found.append(name)

        return look

    handles = [
        m.register_forward_hook(hook(name or "the model as a whole, its loss")) for name, m in model.named_modules()
    ]
    try:
        with split_router_inputs(model, batch) as inputs:
            model(**inputs)
    except FloatingPointError as error:
        found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
