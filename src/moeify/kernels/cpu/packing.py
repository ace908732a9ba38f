"""Packed copies of expert weights for faster products: created where `pack` allows it, and updated with the weights."""

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

_COPIES: Any = WeakIdKeyDictionary()  # owner -> name -> (fingerprints of the tensors, result of `make`)
_PACKED: WeakSet[nn.Module] = WeakSet()
_SAMPLES = 32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(model: Model) -> Model:
    """Allow kernels to cache a packed copy of the expert weights of a model; in place.

    Products with packed weights are faster, but both copies stay in memory: the memory of the experts doubles. A copy
    is created at first use and again after the weights change; `unpack` frees it. `MOEIFY_PACK=1` in the environment
    allows packing for every model.
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
    """Whether `pack` was called for a model or a submodule, or `MOEIFY_PACK` allows it for all models."""
    return env.PACK.is_on or any(module in _PACKED for module in model.modules())


def cached(owner: object, name: str, tensors: Sequence[Tensor], make: Callable[[], Thing]) -> Thing:
    """The result of `make()` on `tensors`, cached until one of them changes.

    Changes are detected by the storage, layout and version counter of a tensor, and by a sample of its values, because
    edits through `.data` do not increment the version.

    Args:
        owner: a module or parameter; the results are freed with it.
        name: key of the result for this owner.
        tensors: the inputs of `make`; no inference tensors, which have no version counter.
        make: computes the result; it must not hold a reference to the owner.
    """
    copies = _COPIES.setdefault(owner, {})
    stamps = [_stamp(tensor) for tensor in tensors]
    if name not in copies or copies[name][0] != stamps:
        copies.pop(name, None)  # the old copy is freed before the new one is made
        with torch.no_grad():
            copies[name] = stamps, make()
    return copies[name][1]


def _stamp(tensor: Tensor) -> tuple[Hashable, ...]:
    """A fingerprint that changes with a tensor; it holds a weak reference to the storage, so its id is not reused."""
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
