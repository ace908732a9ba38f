"""Moving experts between processes in a training: weights, gradients and the state of the optimizer, in place.

A stack of experts is a distributed tensor of E slots. Its layer knows which expert lies in each slot and sends rows
there, so routers, losses and controllers go on with the numbers of experts. Checkpoints hold experts in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from moeify import ranks
from moeify.experts.base import Experts
from moeify.experts.parallel import Parallel
from moeify.experts.shadows import Shadows
from moeify.hf.names import EXPERT_PARALLEL
from moeify.layers import sparse_layers
from moeify.parallel.held import held
from moeify.parallel.place import Placement
from moeify.parallel.shard import names_in_one_process


@dataclass(frozen=True, eq=False)
class Divided:
    """A layer whose experts lie in several processes.

    Attributes:
        name: of the layer.
        senders: what sends its rows, each of which has `slots`.
        stacks: the distributed tensors (E, ...) of its experts, by the names that they have in one process.
        ranks: processes that divide the experts among them.
    """

    name: str
    senders: list[Any]
    stacks: dict[str, DTensor]
    ranks: int

    @property
    def slots(self) -> Int[Tensor, "E"]:
        """The expert in each slot."""
        found = self.senders[0].slots
        return torch.arange(self.senders[0].num_experts) if found is None else found


def divided(model: nn.Module) -> list[Divided]:
    """The layers of a model whose experts `shard` or `distribute` divided, in their order.

    Raises:
        ValueError: experts that cannot change places, with the reason.
    """
    found = []
    for name, layer in sparse_layers(model).items():
        senders = [sender for module in layer.module.modules() if (sender := _sender(module)) is not None]
        if senders:
            size = senders[0].ranks if isinstance(senders[0], Parallel) else senders[0].ep_mesh.size()
            found.append(Divided(name, senders, _stacks(model, name, senders), size))
    return found


def _sender(module: nn.Module) -> Any:
    """What sends the rows of a module to experts in several processes, None where nothing does."""
    if isinstance(module, Parallel):
        return module if module.ranks > 1 else None
    return getattr(module, EXPERT_PARALLEL, None)


def _group(sender: Any) -> tuple[int, Any]:
    """The rank of this process among those that divide the experts, and their group."""
    if isinstance(sender, Parallel):
        return sender.rank, sender.group
    return sender.ep_mesh.get_local_rank(), sender.ep_mesh.get_group()


def _stacks(model: nn.Module, layer: str, senders: list[Any]) -> dict[str, DTensor]:
    stacks: dict[str, DTensor] = {}
    plain = names_in_one_process(model)
    names = {id(t): plain[name] for name, t in (*model.named_parameters(), *model.named_buffers())}
    for sender in senders:
        modules = [m for part in sender.experts.modules() if isinstance(part, Experts) for m in part.common_modules()]
        common = {id(parameter) for module in modules for parameter in module.parameters()}
        buffers = sender.experts.named_buffers() if isinstance(sender, Parallel) else ()
        for key, tensor in (*sender.experts.named_parameters(), *buffers):
            if id(tensor) in common:
                continue
            meshes = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
            if not isinstance(tensor, DTensor) or "ep" not in meshes or len(tensor) != sender.num_experts:
                raise ValueError(
                    f"the experts of {layer} cannot change places: {key} is not one distributed tensor of all "
                    f"{sender.num_experts} experts, as where they are modules of their own, or of several kinds; "
                    "train them without moving them"
                )
            stacks[names[id(tensor)]] = tensor
    return stacks


@torch.no_grad()
def move_experts(model: nn.Module, placement: Placement, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Let the experts of a model lie where a placement says, from the next step on; all processes call it together.

    What the model computes stays the same, up to the order in which gradients of different experts are summed.

    Args:
        model: divided by `shard` or `distribute`, between two steps.
        placement: a layer for each divided layer, in their order. The first E / ranks slots of every process are the
            experts that it trains, one of each; further ones are shadows, of which it computes rows too.
        optimizer: of the model, whose state moves too.

    Raises:
        ValueError: a placement for other layers, experts or processes; experts or an optimizer that cannot move.
    """
    layers = divided(model)
    require_fitting(layers, placement)
    states: Mapping[Tensor, dict[str, Any]] = {} if optimizer is None else optimizer.state
    for layer in layers:
        for name, stack in layer.stacks.items():
            for key, value in states.get(stack, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != stack.shape:
                    raise ValueError(
                        f"the optimizer keeps {key} of {name} in the shape {tuple(value.shape)}, which cannot follow "
                        "experts to other processes; use one whose state has the shape of parameters, such as AdamW"
                    )
    for layer, lies in zip(layers, placement.held, strict=True):
        own = placement.num_experts // placement.ranks
        wanted = lies[:, :own].flatten()
        has_shadows = any(set(of.tolist()) - set(of[:own].tolist()) for of in lies)
        for sender in layer.senders:
            at, group = _group(sender)
            sender.shadows = Shadows.of(lies, own, at, group) if has_shadows else None
        if torch.equal(layer.slots, wanted):
            continue
        source = layer.slots.argsort()[wanted]  # the slot in which the new one's expert lies now
        for stack in layer.stacks.values():
            _reorder(stack, source)
            for value in (stack.grad, *states.get(stack, {}).values()):
                if isinstance(value, DTensor) and value.dim():
                    _reorder(value, source)
        in_order = torch.equal(wanted, torch.arange(len(wanted)))
        for sender in layer.senders:
            sender.slots = None if in_order else wanted.clone()


def require_fitting(layers: list[Divided], placement: Placement) -> None:
    """Raise ValueError unless a placement lets every process of these layers train as many experts, one of each."""
    if not layers:
        raise ValueError("no experts of this model lie in several processes; call shard or distribute with ep above 1")
    if len(placement.experts) != len(layers):
        raise ValueError(f"the placement has {len(placement.experts)} layers, and the model divides {len(layers)}")
    for layer in layers:
        if (placement.num_experts, placement.ranks) != (len(layer.slots), layer.ranks):
            raise ValueError(
                f"the placement is of {placement.num_experts} experts on {placement.ranks} processes, and {layer.name} "
                f"has {len(layer.slots)} on {layer.ranks}"
            )
    trained = placement.held[:, :, : placement.num_experts // placement.ranks].flatten(1)
    slots, experts = placement.experts.shape[1], placement.num_experts
    if not torch.equal(trained.sort(1).values, torch.arange(placement.num_experts).expand_as(trained)):
        raise ValueError(
            f"the placement has {slots} slots for {experts} experts, and the first of "
            "every process are not one of each; a training keeps one of each: use shadows, not replicas"
        )


@torch.no_grad()
def in_order(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name in one process, `NAME` or `NAME|STATE`; those of moved experts as copies, in their order."""
    moved = _moved(model)
    found = dict(tensors)
    for name, tensor in tensors.items():
        slots = moved.get(name.partition("|")[0])
        if slots is not None and isinstance(tensor, DTensor) and tensor.dim():
            copied: Any = tensor.detach().clone()
            _reorder(copied, slots.argsort())
            found[name] = copied
    return found


@torch.no_grad()
def to_slots(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Tensors by name, as of `in_order`, which hold experts in their order: put each into its slot, in place."""
    moved = _moved(model)
    for name, tensor in tensors.items():
        slots = moved.get(name.partition("|")[0])
        if slots is not None and isinstance(tensor, DTensor) and tensor.dim():
            _reorder(tensor, slots)


def _moved(model: nn.Module) -> dict[str, Int[Tensor, "E"]]:
    """The slots of every stack whose experts were moved."""
    senders = [sender for module in model.modules() if (sender := _sender(module)) is not None]
    if all(sender.slots is None for sender in senders):
        return {}
    return {name: layer.slots for layer in divided(model) for name in layer.stacks}


def _reorder(tensor: DTensor, source: Int[Tensor, "E"]) -> None:
    """Give every index of the first dimension what lay at another one, in place, across processes.

    Processes send each other only what changes its process or its place, one tensor at a time.
    """
    here: Shaped[Tensor, "held ..."] = tensor.to_local()
    mesh, mine = tensor.device_mesh, held(tensor, 0)
    copies = tuple(mesh.get_local_rank(i) for i, p in enumerate(tensor.placements) if p.is_replicate())
    table = ranks.gather((copies, mine, here.shape[1:]))
    if len({rest for _, indices, rest in table if indices}) > 1:
        raise ValueError("experts that are cut inside, by tensor parallelism, cannot change places; use tp of 1")
    owner = {(copy, index): rank for rank, (copy, indices, _) in enumerate(table) for index in indices}
    origin, me = source.tolist(), ranks.rank()
    send: list[list[int]] = [[] for _ in table]
    receive: list[list[int]] = [[] for _ in table]
    for rank, (copy, indices, _) in enumerate(table):
        for at, index in enumerate(indices):
            if origin[index] == index:
                continue
            of = owner[copy, origin[index]]
            if of == me:
                send[rank].append(mine.index(origin[index]))
            if rank == me:
                receive[of].append(at)
    if not any(any(origin[i] != i for i in indices) for _, indices, _ in table):
        return
    sent = here[[at for part in send for at in part]].contiguous()
    got = sent.new_empty(sum(map(len, receive)), *here.shape[1:])
    distributed.all_to_all_single(got, sent, [len(part) for part in receive], [len(part) for part in send])
    here[[at for part in receive for at in part]] = got
