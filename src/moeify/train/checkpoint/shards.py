"""What a process holds of a sharded tensor, and how all processes write theirs together: one safetensors file each.

The files are those of torch.distributed.checkpoint (its `HuggingFaceStorageWriter`), which reads them too.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moeify import ranks
from moeify.notices import notify
from moeify.parallel.held import held

MODEL, OPTIMIZER = "model", "optimizer"
"""The folders of a checkpoint that hold shards."""
Box = tuple[Shaped[Tensor, "..."], tuple[int, ...]]


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only a part of some parameter."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def boxes(tensor: Tensor) -> list[Box]:
    """The rectangular parts of a tensor that lie on this process, each with its first index in the whole tensor.

    They share memory with the tensor. One that is not sharded is one part.
    """
    if not isinstance(tensor, DTensor):
        return [(tensor.detach(), (0,) * tensor.dim())]
    with torch.no_grad():
        here = tensor.to_local()
    if not here.numel():
        return []
    runs = [_runs(tensor, dim) for dim in range(tensor.dim())]
    return [
        (here[tuple(slice(at, at + length) for at, _, length in box)], tuple(first for _, first, _ in box))
        for box in itertools.product(*runs)
    ]


def _runs(tensor: DTensor, dim: int) -> list[tuple[int, int, int]]:
    """Runs of consecutive indices of a dimension that lie here: first one here, first one in the whole, length."""
    if all(placement.is_replicate() or getattr(placement, "dim", dim) != dim for placement in tensor.placements):
        return [(0, 0, tensor.shape[dim])]
    here = held(tensor, dim)
    starts = [i for i in range(len(here)) if not i or here[i] != here[i - 1] + 1]
    return [(i, here[i], j - i) for i, j in itertools.pairwise([*starts, len(here)])]


def writable(
    tensors: Mapping[str, Tensor], *, may_differ: Container[str] = (), copy: bool = False, group: Any = None
) -> dict[str, Tensor]:
    """Tensors as `write_shards` takes them: one rectangular part per process, and equal where several hold it.

    All processes must call it together.

    Args:
        tensors: parameters, buffers or states of an optimizer, by name.
        may_differ: names of those that need not be equal on all processes; the first process's are written.
        copy: copy what lies on this process to the CPU, so that training may go on.
        group: of all processes.

    Raises:
        ValueError: another one that is not sharded differs between processes.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    scattered = [name for name, tensor in tensors.items() if len(boxes(tensor)) > 1]
    told = ranks.gather((scattered, {name: _sum(tensor) for name, tensor in whole.items()}), group)
    sums = [of_rank for _, of_rank in told]
    differing = sorted(name for name in set().union(*sums) if len({of_rank.get(name) for of_rank in sums}) > 1)
    if wrong := [name for name in differing if name not in may_differ]:
        raise ValueError(
            f"{', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''} differ between processes "
            "and are not sharded: processes have drifted apart, or each holds experts of its own as plain tensors; "
            "shard those by torch.distributed.tensor.distribute_tensor, so that each process's part has its place"
        )
    first = ranks.rank() == 0
    if differing and first:
        notify(
            f"moeify: {', '.join(differing[:3])} differ between processes, and the checkpoint holds those of the first"
        )
    spread = {name for names, _ in told for name in names}
    kept = {name: tensor for name, tensor in tensors.items() if first or name not in differing}
    return {name: _writable(tensor, name in spread, copy) for name, tensor in kept.items()}


def _writable(tensor: Tensor, spread: bool, copy: bool) -> Tensor:
    tensor = tensor.detach()
    if spread and isinstance(tensor, DTensor):  # DCP writes one part per process
        plain = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
        tensor = tensor.redistribute(placements=plain)
    return tensor.to("cpu", copy=True) if copy else tensor


def _sum(tensor: Tensor) -> int:
    """The sum of the bits, as integers as wide as the numbers: another value has another one, as good as always."""
    bits = tensor.detach().contiguous().view(-1)
    bits = torch.view_as_real(bits).view(-1) if bits.is_complex() else bits
    return int(bits.view(_INTEGERS[bits.element_size()]).sum(dtype=torch.int64))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_shards(tensors: Mapping[str, Tensor], folder: Path, group: Any = None) -> None:
    """Write what lies on each process to a file of its own; all processes must call it together.

    Args:
        tensors: what `writable` returned.
        folder: an empty one, created if missing; readers of DCP take every file in it for a shard.
        group: of all processes.

    Raises:
        OSError: on all processes, if one of them could not write.
        RuntimeError: on all processes, if anything else went wrong on one of them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if odd := next((name for name, value in tensors.items() if not isinstance(value, Tensor)), None):
        raise TypeError(f"{odd} is no tensor, and its file could not be read again")
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a single process writes, and of torch's own names
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not ranks.several())
    except CheckpointException as error:  # no Exception to torch
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        said = "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(causes.items()))
        if all(isinstance(cause, OSError) for cause in causes.values()):
            raise OSError(said) from error
        raise RuntimeError(f"the shards could not be written: {said}") from error


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of whole tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def require_space(folder: Path, needed: int) -> None:
    """Raise if a file system has no room.

    Args:
        folder: an existing one.
        needed: bytes.

    Raises:
        OSError: it has less; the message says how much.
    """
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free", str(folder))
