"""Which indices of a distributed tensor lie in this process, whatever its placements."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


def held(tensor: DTensor, dim: int) -> list[int]:
    """The indices of a dimension that lie here, in the order of the local part.

    The placements shard a vector of all indices as they shard the dimension, whatever their kind.

    Raises:
        TypeError: a tensor whose value is a sum over processes.
    """
    placements = [_of_vector(placement, dim) for placement in tensor.placements]
    if all(placement.is_replicate() for placement in placements):
        return list(range(tensor.shape[dim]))
    indices = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type)
    return distribute_tensor(indices, tensor.device_mesh, placements, src_data_rank=None).to_local().tolist()


def _of_vector(placement: Any, dim: int) -> Any:
    if isinstance(placement, _StridedShard) and placement.dim == dim:
        return _StridedShard(0, split_factor=placement.split_factor)
    if isinstance(placement, Shard) and placement.dim == dim:
        return Shard(0)
    if placement.is_partial():
        raise TypeError(
            "a tensor whose value is a sum over processes (Partial) cannot be saved or moved; redistribute it first"
        )
    return Replicate()
