"""Measure the machine that this runs on, so that a plan is made for it: products, memory, experts and links."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch import Tensor

from moeify.experts import FFN
from moeify.parallel.cluster import Cluster, Device, Link
from moeify.parallel.fixed import Fixed
from moeify.parallel.grouped import ExpertWork, GroupedCost
from moeify.ranks import all_reduce, several

Clock = Callable[[], float]


def measure(
    device: str | torch.device | None = None, *, size: int | None = None, clock: Clock = time.perf_counter
) -> Cluster:
    """The cluster that this process runs on; under torchrun every process measures, and all get the same answer.

    Without a process group it is one device. Under `torchrun`, after `torch.distributed.init_process_group`, links are
    measured by all-to-alls inside each node and between the first ranks of all nodes. FLOP/s and bytes/s are those
    that were reached, in bf16 on a GPU and in fp32 on a CPU, so that `products` and `streaming` are 1. Fixed costs are
    measured on a CPU; in front of a GPU, which computes while its host issues what follows, they are taken to be 0.
    A CPU hides no traffic behind products, since its cores do both; a GPU is taken to hide all that it can.

    Args:
        device: where to measure; by default the GPU of this process, or the CPU.
        size: rows and columns of the largest product; by default 8,192 on a GPU and 1,024 on a CPU.
        clock: in seconds; `time.process_time` measures a CPU that does other work meanwhile, or whose cores are fewer
            than the processes, as if every process had one to itself: `Cluster.shared` divides them.

    Raises:
        ValueError: nodes have different numbers of processes.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    where = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    size = size or (8192 if where.type == "cuda" else 1024)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=where, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / _seconds(lambda: left @ right, where, clock)
    source = torch.empty(4 * size * size, device=where)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), where, clock)
    found = torch.tensor([flops, bandwidth, _memory(where)], dtype=torch.float64, device=where)
    flops, bandwidth, memory = (all_reduce(found) / _ranks()).tolist()
    experts = _experts(where, dtype, size // 4, flops, bandwidth, clock)
    here = Device(
        name=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu", memory=memory, flops=flops,
        bandwidth=bandwidth, products=1.0, attention=1.0, streaming=1.0, experts=experts,
        fixed=Fixed() if where.type == "cuda" else Fixed.measure(clock), overlap=float(where.type == "cuda"),
    )  # fmt: skip
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", _ranks()))
    if _ranks() % per_node:
        raise ValueError(f"{_ranks()} processes are not equally many on nodes of {per_node}; start as many on each")
    intra, inter = _links(where, per_node, Link(bandwidth=bandwidth, latency=1e-6), clock)
    return Cluster(nodes=_ranks() // per_node, devices_per_node=per_node, device=here, intra=intra, inter=inter)


def _ranks() -> int:
    return torch.distributed.get_world_size() if several() else 1


def _seconds(work: Callable[[], object], where: torch.device, clock: Clock, times: int = 5) -> float:
    """The least of several turns after one that warms up."""
    least = float("inf")
    for turn in range(times + 1):
        _wait(where)
        start = clock()
        work()
        _wait(where)
        least = min(least, clock() - start) if turn else least
    return least


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _memory(where: torch.device) -> float:
    """Bytes of the device; on a CPU those of the machine, shared by its processes."""
    if where.type == "cuda":
        return float(torch.cuda.get_device_properties(where).total_memory)
    return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@torch.no_grad()
def _experts(
    where: torch.device, dtype: torch.dtype, width: int, flops: float, bandwidth: float, clock: Clock
) -> GroupedCost:
    """The cost that fits a few layers of this device, or its starting values where it hardly departs from them."""
    works, times = [], []
    for experts, hidden in ((4, width), (16, width // 2)):
        layer = FFN(experts, width, hidden).to(where, dtype)
        for rows in (1, 8, 64, 256):
            counts = torch.full((experts,), rows, device=where)
            x = torch.randn(experts * rows, width, device=where, dtype=dtype)
            works.append(ExpertWork.of(counts.cpu(), width=width, hidden=hidden))
            times.append(_seconds(lambda layer=layer, x=x, counts=counts: layer(x, counts), where, clock))
    found = GroupedCost.fit(ExpertWork.cat(works), torch.tensor(times, dtype=torch.float64), flops, bandwidth, steps=50)
    values = torch.tensor(list(vars(found).values()), dtype=torch.float64, device=where)
    return GroupedCost(**dict(zip(vars(found), (all_reduce(values) / _ranks()).tolist(), strict=True)))


def _links(where: torch.device, per_node: int, alone: Link, clock: Clock) -> tuple[Link, Link]:
    """The link inside a node, and the one between nodes: `alone` where there is nobody to speak to."""
    if not several():
        return alone, alone
    world, rank = _ranks(), torch.distributed.get_rank()
    nodes = [list(range(first, first + per_node)) for first in range(0, world, per_node)]
    groups = [(ranks, torch.distributed.new_group(ranks)) for ranks in (*nodes, list(range(0, world, per_node)))]
    inside = next(((ranks, group) for ranks, group in groups[:-1] if rank in ranks), groups[0])
    intra = _link(where, clock, *inside) if per_node > 1 else alone
    inter = _link(where, clock, *groups[-1]) if len(nodes) > 1 else intra
    return intra, inter


def _link(where: torch.device, clock: Clock, ranks: list[int], group: object) -> Link:
    """Bandwidth and latency of an all-to-all, on the slowest process; processes outside the group only learn them."""
    found = torch.zeros(2, dtype=torch.float64, device=where)
    if torch.distributed.get_rank() in ranks:
        times = []
        for numbers in (len(ranks), len(ranks) << 18):
            sent = torch.zeros(numbers, device=where)
            received: Tensor = torch.empty_like(sent)
            both = partial(torch.distributed.all_to_all_single, received, sent, group=group)
            times.append(_seconds(both, where, clock))
        moved = 4 * (len(ranks) - 1 << 18)
        found = torch.tensor([max(times[1] - times[0], 1e-9) / moved, times[0]], dtype=torch.float64, device=where)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return Link(bandwidth=1 / float(found[0]), latency=float(found[1]))
