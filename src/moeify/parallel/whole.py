"""A model that several processes hold, as one process has it: its tensors, by their names there, and its layers."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from moeify import ranks
from moeify.experts.parallel import Parallel
from moeify.parallel.moving import in_order
from moeify.parallel.shard import names_in_one_process


def is_divided(model: nn.Module) -> bool:
    """Whether some process lacks a part of the model."""
    tensors = model.state_dict(keep_vars=True).values()
    return bool(_parallels(model)) or any(isinstance(tensor, DTensor) for tensor in tensors)


@torch.no_grad()
def whole_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by their names in one process, whole; those that were divided in the memory of the CPU.

    All processes call it together. Tied tensors stay tied, and experts are in their order, wherever they lie.

    Args:
        model: divided by `shard`, `distribute`, `spread` or `fully_shard`, or not at all.
        tensors: of its `state_dict(keep_vars=True)`.

    Returns:
        All of them on the first process, and none on the others, which hold one at a time.
    """
    plain = names_in_one_process(model)
    parallels = _parallels(model)
    apart = {name for prefix, parallel in parallels.items() for name in _own(prefix, parallel)}
    together = {plain.get(name, name): tensor for name, tensor in tensors.items() if name not in apart}
    gathered: dict[int, Tensor] = {}
    found = {}
    for name, tensor in in_order(model, together).items():
        if isinstance(tensor, DTensor):
            if id(tensor) not in gathered:
                gathered[id(tensor)] = _kept(tensor.full_tensor())
            found[name] = gathered[id(tensor)]
        else:
            found[name] = tensor
    for prefix, parallel in parallels.items():
        own = {name: tensors[name] for name in _own(prefix, parallel) if name in tensors}
        found |= _of_all(parallel, prefix, {plain[name]: tensor for name, tensor in own.items()})
    return found if ranks.rank() == 0 else {}


@contextmanager
def as_in_one_process(model: nn.Module) -> Generator[None]:
    """Context manager in which modules have the names, classes and sizes of one process; divided experts no values.

    All of a model may be read inside, and nothing computed.
    """
    divided = [(m, name, child) for m in model.modules() for name, child in m.named_children()
               if isinstance(child, Parallel)]  # fmt: skip
    classes = {module: type(module) for module in model.modules() if class_of(module) is not type(module)}
    try:
        for module in classes:
            module.__class__ = class_of(module)
        for module, name, parallel in divided:
            module._modules[name] = parallel.whole
        yield
    finally:
        for module, name, parallel in divided:
            module._modules[name] = parallel
        for module, made in classes.items():
            module.__class__ = made


def class_of(module: nn.Module) -> type:
    """The class of a module, without the one that FSDP2 puts in front of it."""
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return next(each for each in type(module).__mro__ if not issubclass(each, wrapper))


def _parallels(model: nn.Module) -> dict[str, Parallel]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Parallel) and m.ranks > 1}


def _own(prefix: str, parallel: Parallel) -> list[str]:
    """The names of the tensors that are not one tensor of all processes: those of this process's experts alone."""
    common = parallel.common_parameters()
    found = []
    for name, tensor in parallel.experts.state_dict(keep_vars=True).items():
        meshes = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
        if tensor not in common and "ep" not in meshes:
            found.append(f"{prefix}.experts.{name}")
    return found


def _of_all(parallel: Parallel, prefix: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the experts of all processes of a group, by name; those of a stack are put together."""
    here = {n: t.full_tensor() if isinstance(t, DTensor) else t.detach() for n, t in own.items()}
    parts: dict[str, list[Tensor]] = {}
    facts = [(name, tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in here.items()]
    for number, of_rank in enumerate(ranks.gather(facts, parallel.group)):
        source = distributed.get_process_group_ranks(parallel.group)[number]
        for name, shape, dtype, device in of_rank:
            mine = number == parallel.rank
            part = here[name].contiguous() if mine else torch.empty(shape, dtype=dtype, device=device)
            distributed.broadcast(part, source, group=parallel.group)
            parts.setdefault(name, []).append(_kept(part))
    stacks = {f"{prefix}.{name}" for name in parallel.stacks}
    return {name: torch.cat(of_name) if name in stacks else of_name[0] for name, of_name in parts.items()}


def _kept(tensor: Tensor) -> Tensor:
    """The tensor in the memory of the CPU of the first process, and without memory in the others."""
    return tensor.cpu() if ranks.rank() == 0 else tensor.to("meta")
