"""A small model of every router, trained in one process and by several ranks: both must agree in all they compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.device_mesh import init_device_mesh as make_mesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moeify import MoE, losses
from moeify.parallel import names_in_one_process, shard
from moeify.record import record
from test_matrix import EXPERTS, ROUTERS, D

ONE_BATCH = {"default vector"}
"""Routers whose state sees the batches of all ranks at once; it is a sum in fp32 of all their outputs."""
ROUNDED = 1e-6


class Block(nn.Module):
    """A layer with a residual connection; several gates are averaged."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), moe

    def forward(self, x: Tensor) -> Tensor:
        y = self.moe(self.norm(x))
        return x + (y.mean(-2) if y.dim() > x.dim() else y)


class Net(nn.Module):
    """Two sparse layers between two linear ones."""

    def __init__(self, router: str, experts: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 3)
        self.layers = nn.ModuleList(
            Block(MoE(ROUTERS[router](), EXPERTS[experts](), backend="compose")) for _ in range(2)
        )
        for parameter in self.parameters():
            if not parameter.count_nonzero():
                nn.init.normal_(parameter, std=0.1)
        self.to(dtype)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.layers:
            block.moe.context.call.inputs["input_ids"] = ids
        x = self.first(x)
        for block in self.layers:
            x = block(x)
        return self.last(x).clone()


def batches(ranks: int, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, their ids and the weights of a loss, for every rank."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for rank in range(ranks):
        shape = shapes[rank % len(shapes)]
        x = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
        ids = torch.randint(12, shape, generator=generator)
        made.append((x.to(dtype), ids, torch.randn(*shape, 3, dtype=torch.float64, generator=generator).to(dtype)))
    return made


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor], seed: int, balanced: bool) -> Tensor:
    """A loss of the outputs, and what balances the decisions, for a rank's batch; its noise is that of the seed."""
    torch.manual_seed(seed)
    x, ids, weight = batch
    with record(net) as decisions:
        loss = (net(x, ids) * weight).sum()
    for routing in decisions.values() if balanced else ():
        if routing.scores is not None and routing.assigned is not None and len(routing.scores):
            loss = loss + 0.1 * losses.balance(routing).to(loss.dtype)
        if routing.logits is not None and len(routing.logits):
            loss = loss + 0.1 * losses.z(routing).to(loss.dtype)
    return loss


def train(
    net: nn.Module, mine: Sequence[tuple[Tensor, Tensor, Tensor]], first: int, of: int, steps: int, balanced: bool
):
    """Losses, gradients of the first step, and parameters and buffers after the last."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        for i, batch in enumerate(mine):
            loss = loss_of(net, batch, 100 * step + first + i, balanced)
            (loss / of).backward()
            found[f"loss {step} {first + i}"] = loss.detach()
        if step == 0:
            named = ((name, p.grad) for name, p in net.named_parameters() if p.grad is not None)
            found |= {f"gradient {name}": gradient.clone() for name, gradient in named}
        optimizer.step()
        optimizer.zero_grad()
    return found | {f"state {name}": t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}


def in_one_process(router: str, experts: str, dtype: torch.dtype, ranks: int, **settings: Any) -> dict[str, Tensor]:
    """The oracle: the batches of all ranks, one after the other."""
    net, data = net_of(router, experts, dtype, **settings), batches(ranks, settings["shapes"], dtype)
    if router in ONE_BATCH:
        data = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    return train(net, data, 0, ranks, settings["steps"], router not in ONE_BATCH)


def on_rank(
    rank: int,
    ranks: int,
    expected: dict[str, Tensor],
    how: dict[str, Any],
    router: str,
    experts: str,
    dtype: torch.dtype,
    **settings: Any,
) -> tuple[dict[str, float], set[str]]:
    """Case: how far this rank's part of the same training is from the oracle, and the names of what it holds."""
    device_mesh.init_device_mesh = one_mesh
    net = shard(net_of(router, experts, dtype, **settings), **how)
    data = batches(ranks, settings["shapes"], dtype)
    found = train(net, [data[rank]], rank, 1, settings["steps"], router not in ONE_BATCH)
    plain = names_in_one_process(net)
    worst = dict.fromkeys(("loss", "gradient", "state"), 0.0)
    held = set()
    for key, value in found.items():
        kind, name = key.split(maxsplit=1)
        held.add(key := f"{kind} {plain.get(name, name)}")
        if kind == "loss" and router in ONE_BATCH:
            continue
        want, got = part_of(expected[key], value)
        assert got.shape == want.shape, f"{key} is {tuple(got.shape)}, and {tuple(want.shape)} in one process"
        scale = max([1e-3, *expected[key].double().abs().flatten().tolist()])
        worst[kind] = max([worst[kind], *((got.double() - want.double()).abs().flatten() / scale).tolist()])
    return worst, held


def part_of(expected: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The part of an expected tensor that lies here, and what does lie here."""
    if not hasattr(value, "to_local"):
        return expected, value
    assert value.shape == expected.shape, f"{tuple(value.shape)}, and {tuple(expected.shape)} in one process"
    shape, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return expected[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))], value.to_local()


@cache
def one_mesh(device: str, sizes: tuple[int, ...], *, mesh_dim_names: tuple[str, ...]) -> Any:
    """The groups of a layout, made once for all cases."""
    return make_mesh(device, sizes, mesh_dim_names=mesh_dim_names)


def net_of(router: str, experts: str, dtype: torch.dtype, collapse: bool = False, **_: Any) -> Net:
    """The model before it is divided; `collapse` lets all tokens choose the same experts."""
    net = Net(router, experts, dtype)
    if collapse:
        for block in net.layers:
            block.norm.bias.data.fill_(1.0)
            block.norm.weight.data.mul_(0.01)
    return net


def differences(pool: Any, ranks: int, how: dict[str, Any], router: str, experts: str = "swiglu", **settings: Any):
    """The largest differences over all ranks, relative to the largest number of a tensor in one process."""
    settings = {"shapes": [(3, 4)], "steps": 1, "dtype": torch.float64} | settings
    dtype = settings.pop("dtype")
    expected = in_one_process(router, experts, dtype, ranks, **settings)
    answers = pool(ranks, run, expected, how, router, experts, dtype, settings)
    missing = expected.keys() - set().union(*(held for _, held in answers))
    assert router in ONE_BATCH or not missing, f"no rank has {sorted(missing)}"
    return {kind: max(worst[kind] for worst, _ in answers) for kind in ("loss", "gradient", "state")}


def run(rank: int, ranks: int, *case: Any) -> Any:
    """Case: `on_rank` with settings."""
    *arguments, settings = case
    return on_rank(rank, ranks, *arguments, **settings)
