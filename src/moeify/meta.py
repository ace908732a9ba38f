"""Modules whose parameters have shapes but no memory (torch's meta device), while their buffers are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_FACTORIES = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)
_LARGEST = 2**26
"""Elements of the largest tensor that is made with values: buffers are smaller, and a damaged width may be huge."""


class _WithoutMemory(TorchFunctionMode):
    """`torch.empty` makes parameters, which are initialised in place; other factories may make buffers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is None and (func is torch.empty or (func in _FACTORIES and _is_large(args, kwargs))):
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _is_large(args: tuple, kwargs: dict[str, Any]) -> bool:
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return all(isinstance(n, int) for n in size) and math.prod(size) > _LARGEST


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Context manager in which modules get no memory for large parameters; buffers keep their initial values."""
    with _WithoutMemory():
        yield


@contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Context manager in which modules are made on a device; on the meta device only their parameters are."""
    with parameters_on_meta() if device.type == "meta" else torch.device(device):
        yield


def made_on_meta(make: Callable[[], nn.Module]) -> nn.Module | None:
    """The module that `make` returns, without memory for its parameters; None if that is impossible.

    It is impossible if `make` computes with values of parameters, or if buffers that no file holds have no values.
    """
    try:
        with parameters_on_meta():
            made = make()
    except Exception:  # any error of a part that needs values; an unrelated one is raised again with memory
        return None
    computed = ((module, name) for module in made.modules() for name in module._non_persistent_buffers_set)
    buffers = (module._buffers.get(name) for module, name in computed)
    return None if any(buffer is not None and buffer.is_meta for buffer in buffers) else made


def move_parameters(model: nn.Module, device: str) -> None:
    """Give a model parameters of zeros on a device, or without memory on the meta device; in place.

    Tied ones stay tied, buffers stay.
    """
    moved: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                zeros = torch.zeros_like(parameter, device=device)
                moved[id(parameter)] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
                vars(moved[id(parameter)]).update(vars(parameter))
            setattr(module, name, moved[id(parameter)])
