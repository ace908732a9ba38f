"""Memory for the gradients of expert weights on a CPU: allocated once, reused, and accumulated in place."""

from __future__ import annotations

import math
import mmap
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

Model = TypeVar("Model", bound=nn.Module)

_HUGE = 2**21  # bytes of a huge page
_LARGE = _HUGE  # bytes from which on the memory of a gradient is reused
_MAPPED = 2**25  # bytes; malloc reuses smaller freed blocks, larger ones are mapped again on every allocation
_IN_PLACE: Any = WeakIdKeyDictionary()  # the parameters whose `.grad` the backward pass accumulates itself
_SHELVES: Any = WeakIdKeyDictionary()  # parameter -> _FreedMemory


def accumulate_in_place(model: Model) -> Model:
    """Let the backward pass accumulate directly into the `.grad` of expert weights, on a CPU; in place.

    With gradient accumulation over several passes, the gradients of experts without assigned tokens are then neither
    read nor written. Use it with one process and `loss.backward()` only: for a weight that has a `.grad` already,
    `torch.autograd.grad` returns no gradient and `DistributedDataParallel` does not reduce it. The gradients of weights
    with gradient hooks are accumulated by autograd.
    """
    for parameter in model.parameters():
        _IN_PLACE[parameter] = True
    return model


def free_gradients(model: nn.Module) -> None:
    """Release the memory that is cached for the next gradients of a model."""
    for parameter in model.parameters():
        _SHELVES.pop(parameter, None)


@dataclass(frozen=True)
class Place:
    """The memory that the gradient of a weight is written to.

    Attributes:
        into: in the layout of the weight; zero for experts without rows, uninitialised for the others, unless `adds`.
        adds: `into` is the `.grad` of the weight, and is accumulated into.
    """

    into: Tensor
    adds: bool

    @property
    def gradient(self) -> Tensor | None:
        """The gradient to return to autograd."""
        return None if self.adds else self.into


def place_for(weight: Float[Tensor, "E ..."], counts: Sequence[int]) -> Place:
    """The memory for the gradient of a weight or bias.

    Args:
        weight: stacked over the experts.
        counts: rows of each expert.
    """
    if (total := _sum_so_far(weight)) is not None:
        return Place(total, adds=True)
    return Place(gradient_of(weight, counts) if weight.dim() == 3 else torch.zeros_like(weight), adds=False)


def _sum_so_far(weight: Float[Tensor, "E ..."]) -> Float[Tensor, "E ..."] | None:
    owner = _owner(weight)
    total = owner.grad if owner.is_leaf else None
    if total is None or owner not in _IN_PLACE or owner._backward_hooks or owner._post_accumulate_grad_hooks:
        return None
    if type(total) is not Tensor or (total.dtype, total.stride()) != (owner.dtype, owner.stride()):
        return None
    offset = total.storage_offset() + weight.storage_offset() - owner.storage_offset()
    return total.as_strided(weight.shape, weight.stride(), offset)


def gradient_of(weight: Float[Tensor, "E O D"], counts: Sequence[int]) -> Float[Tensor, "E O D"]:
    """A `new_stack` for the gradient of a weight, in its layout, in memory that is cached per weight.

    Mapping memory takes several times as long as writing it. So when a large gradient is freed, its memory is reused by
    the next gradient of the same weight, until the weight is freed or `free_gradients` is called. On Linux the huge
    pages of experts without rows are given back instead of overwritten: they are zero, and mapped only if accessed.

    Args:
        weight: stacked over the experts.
        counts: rows of each expert.
    """
    if weight.stride(1) < weight.stride(2):
        return gradient_of(weight.transpose(1, 2), counts).transpose(1, 2)
    if not weight.is_cpu or weight.nbytes <= _LARGE:
        return new_stack(weight.shape, counts, weight)
    memory, view, is_zero = _SHELVES.setdefault(_owner(weight), _FreedMemory()).take(weight.nbytes)
    stack = torch.frombuffer(view, dtype=weight.dtype).view(weight.shape)
    if not is_zero:
        for first, last in _unrouted(counts):
            _zero(stack[first:last], stack.data_ptr(), memory)
    return stack


def new_stack(shape: Sequence[int], counts: Sequence[int], like: Tensor) -> Float[Tensor, "E O D"]:
    """Stacked matrices, zero for experts without rows and uninitialised for the others.

    The zeros of large stacks are mapped lazily: pages that are neither written nor read take no time and no memory.

    Args:
        shape: shape of the stack.
        counts: rows of each expert.
        like: a tensor of the same dtype and device.
    """
    size = math.prod(shape) * like.element_size()
    if like.is_cpu and size > _MAPPED and not all(counts):
        return torch.frombuffer(_zeros(size), dtype=like.dtype).view(*shape)
    return _zero_unrouted(like.new_empty(*shape), counts)


def _zero_unrouted(stack: Float[Tensor, "E O D"], counts: Sequence[int]) -> Float[Tensor, "E O D"]:
    """Write zeros into the matrices of experts without rows."""
    for matrix, count in zip(stack, counts, strict=True):
        if count == 0:
            matrix.zero_()
    return stack


def _unrouted(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of adjacent experts without rows: the first one, and the one after the last."""
    for is_routed, run in groupby(range(len(counts)), lambda expert: counts[expert] > 0):
        if not is_routed:
            experts = list(run)
            yield experts[0], experts[-1] + 1


def _zero(experts: Float[Tensor, "N O D"], start: int, memory: mmap.mmap) -> None:
    """Make adjacent matrices zero: whole huge pages by giving them back to the system, the rest by writing.

    Args:
        experts: the matrices.
        start: the address of `memory`.
        memory: where they lie.
    """
    begin, end = experts.data_ptr(), experts.data_ptr() + experts.nbytes
    first, last = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
    if sys.platform != "linux" or first >= last:  # elsewhere the advice promises no zeros
        experts.zero_()
        return
    try:
        memory.madvise(mmap.MADV_DONTNEED, first - start, last - first)
    except OSError:  # locked memory
        experts.zero_()
        return
    flat = experts.view(-1)
    flat[: (first - begin) // flat.itemsize].zero_()
    flat[(last - begin) // flat.itemsize :].zero_()


class _FreedMemory:
    """Memory of freed gradients of one weight, to be reused by its next gradient."""

    def __init__(self) -> None:
        self.free: list[mmap.mmap] = []

    def take(self, size: int) -> tuple[mmap.mmap, memoryview, bool]:
        """Memory of `size` bytes, a view after which it is cached again, and whether it is all zeros."""
        self.free = [memory for memory in self.free if len(memory) == size]
        is_zero = not self.free
        memory = _zeros(size, huge_pages=True) if is_zero else self.free.pop()
        view = memoryview(memory)
        weakref.finalize(view, _put_back, weakref.ref(self), memory)
        return memory, view, is_zero


def _put_back(shelf: weakref.ref[_FreedMemory], memory: mmap.mmap) -> None:
    if (owner := shelf()) is not None:
        owner.free.append(memory)


def _zeros(size: int, *, huge_pages: bool = False) -> mmap.mmap:
    """Zero-filled memory whose pages are mapped at first access."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a hint only: systems without huge pages raise an error
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _owner(weight: Tensor) -> Tensor:
    return weight if weight._base is None else weight._base
