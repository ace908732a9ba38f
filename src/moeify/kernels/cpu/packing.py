"""Packed copies of expert weights for faster products: made where `pack` allows it, again when weights change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from moeify import env

Model = TypeVar("Model", bound=nn.Module)
Thing = TypeVar("Thing")

_COPIES: Any = WeakIdKeyDictionary()  # owner -> name -> (stamps of the tensors, what was made of them)
_PACKED: WeakSet[nn.Module] = WeakSet()
_SAMPLES = 32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(model: Model) -> Model:
    """Allow kernels to keep a packed copy of the expert weights of a model; in place.

    The kernels read packed weights faster, but both copies stay in memory: the memory of the experts doubles. A copy is
    made at first use and again after the weights change; `unpack` frees it. `MOEIFY_PACK=1` in the environment allows
    packing for every model.
    """
    _PACKED.update(model.modules())
    return model


def unpack(model: Model) -> Model:
    """Undo `pack`, and free the copies; in place."""
    for module in model.modules():
        _PACKED.discard(module)
        for owner in (module, *module.parameters(recurse=False)):
            _COPIES.pop(owner, None)
    return model


def may_pack(model: nn.Module) -> bool:
    """Whether `pack` was called for a model, for a part of it, or the environment allows it to all."""
    return env.PACK.is_on or any(module in _PACKED for module in model.modules())


def cached(owner: object, name: str, tensors: Sequence[Tensor], make: Callable[[], Thing]) -> Thing:
    """The result of `make()` on `tensors`, cached until one of them changes.

    A change is seen by the memory, layout and version of a tensor, and by a sample of its content, because edits
    through `.data` leave the version as it is.

    Args:
        owner: the copies live as long as it does; a module or the parameter itself.
        name: distinguishes the copies of one owner.
        tensors: what the copy is made of; no inference tensors, which have no version.
        make: makes the copy; it must not keep hold of the owner.
    """
    copies = _COPIES.setdefault(owner, {})
    stamps = [_stamp(tensor) for tensor in tensors]
    if name not in copies or copies[name][0] != stamps:
        copies.pop(name, None)  # the old copy is freed before the new one is made
        with torch.no_grad():
            copies[name] = stamps, make()
    return copies[name][1]


def _stamp(tensor: Tensor) -> tuple[Hashable, ...]:
    """What changes when a tensor does; holds the memory's identity, which is not given to another while it is held."""
    tensor = tensor.detach()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    step = max(1, last // _SAMPLES)
    sample = tensor.as_strided((min(_SAMPLES, last // step) + 1 if tensor.numel() else 0,), (step,))
    return (
        StorageWeakRef(tensor.untyped_storage()),
        tensor._version,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tuple(sample.view(_BITS[tensor.element_size()]).tolist()),
    )
