"""Place a sparse model on several processes: experts divided among some of them, everything else by FSDP2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn

from moeify import ranks
from moeify.experts.parallel import Parallel, spread
from moeify.moe import MoE

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

Units = Callable[[str, nn.Module], bool]


def shard(
    model: nn.Module,
    *,
    ep: int = 1,
    fsdp: bool = True,
    policy: MixedPrecisionPolicy | None = None,
    units: Units | None = None,
    limit: int | None = None,
    broadcast: bool = True,
) -> nn.Module:
    """Divide a sparse model among all processes, in place: experts among `ep` neighbours, the rest by FSDP2.

    Every process trains on its own tokens, and all gradients become means over all processes, as one process has them
    that computes the batches of all one after the other and divides by their number. Experts lie whole, E / ep in each
    of `ep` neighbouring processes, and what a process holds of them is sharded over the world / ep processes that hold
    the same; everything else is sharded over all. All parameters of sharded stacks are DTensors of the shape that they
    have in one process; `names_in_one_process` gives the names that they have there.

        torch.distributed.init_process_group()
        model = shard(sparsify(model, recipe), ep=2)
        optimizer = torch.optim.AdamW(model.parameters())

    Args:
        model: a model whose layers are `MoE`, the same in every process; on the device where it trains.
        ep: processes that divide the experts among them; 1 keeps all experts in every process.
        fsdp: shard parameters, gradients and optimizer states; otherwise each process keeps all, but its experts.
        policy: dtypes of parameters and reductions; routers keep their own.
        units: (name, module) -> whether its parameters are gathered together, by default the elements of lists of
            modules, such as the layers of a transformer. Experts are always gathered on their own.
        limit: rows that a process may receive at once, as of `Parallel`.
        broadcast: start from the weights of the first process, as DDP does; without it they must be the same already.

    Raises:
        ValueError: no process group; `ep` does not divide the processes, or the experts of a layer; experts or
            routers that cannot be divided, by their reasons; a model that is sharded already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    world = _world(ep)
    if any(isinstance(module, FSDPModule | Parallel) for module in model.modules()):
        raise ValueError("this model is sharded already; call shard once, on the whole model")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    _require_division(layers, ep)
    if broadcast:
        _start_alike(model)
    device = next((p.device.type for p in model.parameters() if p.device.type != "meta"), _accelerator())
    sizes = (world // ep, ep) if fsdp else (world // ep, 1, ep)
    names = ("shard", "ep") if fsdp else ("replica", "shard", "ep")
    sparse = init_device_mesh(device, sizes, mesh_dim_names=names)
    rest = init_device_mesh(device, (world,) if fsdp else (world, 1), mesh_dim_names=names[:-1])
    policy = MixedPrecisionPolicy() if policy is None else policy
    if ep > 1:
        for layer in layers.values():
            layer.replace(experts=spread(layer.experts, sparse.get_group("ep"), limit=limit))
        _require_shape(_parallels(model), sparse["ep"])
        for parallel in _parallels(model):
            _distribute(parallel, sparse["ep"])
            alike: DeviceMesh = sparse[names[:-1]] if len(names) > 2 else sparse["shard"]
            fully_shard(parallel, mesh=alike, mp_policy=policy)
    for layer in layers.values():
        if not _fits(layer.router, model, policy):
            own = MixedPrecisionPolicy(param_dtype=None, cast_forward_inputs=False)
            fully_shard(layer.router, mesh=rest, mp_policy=own, reshard_after_forward=False)
    chosen = _of_lists if units is None else units
    for module in _outermost(model, chosen):
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=rest, mp_policy=policy)
    fully_shard(model, mesh=rest, mp_policy=policy)
    if ranks.anywhere(any(next(parallel.parameters(), None) is None for parallel in _parallels(model)), device):
        # By default FSDP gathers the unit before the present one, which is another where a process has no parameters.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_modules_to_backward_prefetch([module])
    return model


def names_in_one_process(model: nn.Module) -> dict[str, str]:
    """Of every parameter and buffer of a sharded model: the name that it has in a model that is not sharded."""
    inside = [name for name, module in model.named_modules() if isinstance(module, Parallel)]
    found = {}
    for name in (*(n for n, _ in model.named_parameters()), *(n for n, _ in model.named_buffers())):
        plain = name
        for prefix in sorted(inside, key=len, reverse=True):
            if name.startswith(f"{prefix}.experts."):
                plain = f"{prefix}.{name.removeprefix(f'{prefix}.experts.')}"
        found[name] = plain
    return found


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients of a sharded model so that their 2-norm together is at most `max_norm`; returns the norm.

    torch's own function of this name refuses parameters on different meshes. The norm is the same in every process: if
    it is not finite, gradients are not finite anywhere, and no process should step.

    Args:
        model: a model that `shard` returned; in one process, any model.
        max_norm: the largest norm.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    locals_, copies = zip(*map(_local, gradients), strict=True) if gradients else ((), ())
    device = locals_[0].device if locals_ else next(model.parameters()).device
    squares = [part.norm(dtype=torch.promote_types(part.dtype, torch.float32)).square() / n
               for part, n in zip(locals_, copies, strict=True)]  # fmt: skip
    total = torch.stack([s.double() for s in squares]).sum() if squares else torch.zeros((), dtype=torch.float64)
    norm = ranks.all_reduce(total.to(device)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in locals_:
        part.mul_(scale.to(part.dtype))
    return norm


def _local(gradient: Tensor) -> tuple[Tensor, int]:
    """The part of a gradient that lies here, and in how many processes the same part lies."""
    if not hasattr(gradient, "to_local"):
        return gradient, ranks.count()
    placed: Any = gradient
    copies = math.prod(
        placed.device_mesh.size(i) for i, placement in enumerate(placed.placements) if placement.is_replicate()
    )
    return placed.to_local(), copies


def _world(ep: int) -> int:
    if not ranks.several():
        raise ValueError(
            "there is no process group; start the program with torchrun and call "
            "torch.distributed.init_process_group() before shard"
        )
    world = ranks.count()
    if ep < 1 or world % ep:
        possible = [n for n in range(1, world + 1) if world % n == 0]
        raise ValueError(f"{world} processes cannot be divided into groups of ep={ep}; choose ep from {possible}")
    return world


def _require_division(layers: dict[str, MoE], ep: int) -> None:
    for name, layer in layers.items():
        if layer.experts.num_experts % ep:
            number = math.gcd(*(other.experts.num_experts for other in layers.values()))
            possible = [n for n in range(1, number + 1) if number % n == 0]
            raise ValueError(
                f"{layer.experts.num_experts} experts of {name} cannot be divided evenly among ep={ep} processes; "
                f"choose ep from {possible}"
            )


def _accelerator() -> str:
    return acc.type if (acc := torch.accelerator.current_accelerator()) is not None else "cpu"


def _start_alike(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            distributed.broadcast(tensor.detach(), 0)


def _parallels(model: nn.Module) -> list[Parallel]:
    return [module for module in model.modules() if isinstance(module, Parallel)]


def _require_shape(parallels: list[Parallel], mesh: DeviceMesh) -> None:
    """Raise in all processes if one of them holds part of a stack that is not in all of its group."""
    reasons = [
        f"the {size} experts in the stack {name} lie in some of {mesh.size()} processes only, and a sharded stack lies "
        "in all of them; choose ep so that groups of experts stay whole, or are divided by all"
        for parallel in parallels
        for name, tensor in (*parallel.experts.named_parameters(), *parallel.experts.named_buffers())
        if (size := parallel.stacks.get(name)) is not None and len(tensor) * mesh.size() != size
    ]
    found: list[list[str]] = [[] for _ in range(ranks.count())]
    distributed.all_gather_object(found, reasons)
    if said := [reason for reasons in found for reason in reasons]:
        raise ValueError(said[0])


def _distribute(parallel: Parallel, mesh: DeviceMesh) -> None:
    """Turn all but what one process alone has into DTensors: checkpoints and norms then know its shape and copies."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    common = parallel.common_parameters()
    for module_name, module in parallel.experts.named_modules():
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kind in kinds:
            for name, tensor in kind.items():
                full = f"{module_name}.{name}".lstrip(".")
                if tensor is None or (full not in parallel.stacks and tensor not in common):
                    continue
                whole = DTensor.from_local(
                    tensor.detach(), mesh, [Replicate() if tensor in common else Shard(0)], run_check=False
                )
                is_parameter = isinstance(tensor, nn.Parameter)
                kind[name] = nn.Parameter(whole, tensor.requires_grad) if is_parameter else whole


def _fits(router: nn.Module, model: nn.Module, policy: MixedPrecisionPolicy) -> bool:
    """Whether a router may be gathered with the modules around it: in one dtype, which gathering does not change."""
    dtypes = {p.dtype for p in router.parameters()}
    return not dtypes or (policy.param_dtype is None and dtypes == {p.dtype for p in model.parameters()})


def _of_lists(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2].isdigit()


def _outermost(model: nn.Module, chosen: Units) -> Iterator[nn.Module]:
    """The modules that are chosen, but none inside another or inside parallel experts."""

    def visit(prefix: str, module: nn.Module) -> Iterator[nn.Module]:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if isinstance(child, Parallel):
                continue
            if chosen(full, child):
                yield child
            else:
                yield from visit(f"{full}.", child)

    yield from visit("", model)
