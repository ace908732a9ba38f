"""Cases for ranks: trainings whose experts move from process to process, beside the same ones whose experts stay."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distributed.trained import BUILD, _forget_accelerate, whole
from moeify import MoE
from moeify.balance import Sign, control
from moeify.experts import FFN, Each
from moeify.parallel import (
    DEVICES,
    TARGETS,
    Cluster,
    Layout,
    Link,
    ModelShape,
    Move,
    Placed,
    Placement,
    Rebalancer,
    Rebalancing,
    Step,
    Workload,
    clip_grad_norm_,
    distribute,
    names_in_one_process,
    shard,
)
from moeify.parallel.moving import in_order
from moeify.routers import TopK, sigmoid
from moeify.train import Rebalance, SparseArguments, load_sharded, save_sharded
from ranks import train

WIDTH, EXPERTS, STEPS = 8, 8, 10


class Model(nn.Module):
    """Two sparse layers with selection biases, whose tokens crowd at few experts."""

    def __init__(self, experts=FFN) -> None:
        super().__init__()
        torch.manual_seed(0)
        router = partial(TopK, WIDTH, EXPERTS, k=2, score=sigmoid, selection_bias=True, init_std=1.0)
        self.layers = nn.ModuleList(
            MoE(router(), experts(EXPERTS, WIDTH, 16) if experts is FFN else experts(), backend="compose")
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Shuffles:
    """Proposes another random placement at every second step, with shadows of random experts where there are any."""

    spare = 0

    def __init__(self, layers: int, experts: int, ranks: int, shadows: int = 0) -> None:
        self.placement, self.shadows = Placement.contiguous(layers, experts, ranks), shadows
        self.generator, self.seen = torch.Generator().manual_seed(0), 0

    def observe(self, counts):
        self.seen += 1
        assert counts.sum() > 0
        if self.seen % 2 == 0:
            return None
        layers, experts, ranks = *counts.shape, self.placement.ranks
        orders = torch.stack([torch.randperm(experts, generator=self.generator) for _ in counts])
        lent = torch.randint(experts, (layers, ranks, self.shadows), generator=self.generator)
        held = torch.cat([orders.view(layers, ranks, -1), lent], 2)
        self.placement = Placement(held.flatten(1), ranks, experts)
        return Move(placement=self.placement, layers=len(orders), bytes=0.0, seconds=0.0, saves=0.0)


def batch_of(step, rank, ranks):
    rows = torch.randn(8, 3, WIDTH, generator=torch.Generator().manual_seed(step))
    return rows.chunk(ranks)[rank]


def steps(model, optimizer, moved, first, last, rank, ranks, running=None):
    norms = []
    for step in range(first, last):
        x = batch_of(step, rank, ranks)
        (model(x) - x.roll(1, -1)).square().mean().backward()
        norms.append(float(clip_grad_norm_(model, 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        if running is not None:
            running.step()
    return norms


def made(ep, fsdp=True, limit=None):
    model = shard(Model(), ep=ep, fsdp=fsdp, limit=limit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, control(model, optimizer, Sign(1e-2))


def results(model, optimizer, rank, ranks):
    """Outputs, and whole weights and states with experts in their order."""
    plain = names_in_one_process(model)
    tensors = {plain[name]: p for name, p in model.named_parameters()}
    names = {id(p): name for name, p in tensors.items()}
    tensors |= {f"{names[id(p)]}|{k}": v for p, kept in optimizer.state.items() for k, v in kept.items()}
    model.eval()
    with torch.no_grad():
        outputs = model(batch_of(100, rank, ranks))
    model.train()
    found = {name: whole(t) for name, t in in_order(model, tensors).items()}
    return found | {"outputs": outputs} | {name: b.clone() for name, b in model.named_buffers()}


def beside_static(rank, ranks, ep, fsdp, shadows=0):
    """Case: the largest difference from the training whose experts stay, and the places of the experts at its end.

    With shadows, processes receive few rows at once, so that weights are lent in every round.
    """
    found = []
    for moves in (False, True):
        model, optimizer, _ = made(ep, fsdp, limit=8 if shadows else None)
        running = Rebalancing(model, optimizer, Shuffles(2, EXPERTS, ep, shadows)) if moves else None
        norms = steps(model, optimizer, None, 0, STEPS, rank, ranks, running)
        found.append(results(model, optimizer, rank, ranks) | {"norms": torch.tensor(norms)})
    slots = [layer.experts.slots for layer in model.layers]
    running.end()
    after = results(model, optimizer, rank, ranks)
    home = [layer.experts.slots for layer in model.layers]
    assert home == [None, None]
    assert found[0].keys() == found[1].keys()
    worst = {name: float((found[0][name] - found[1][name]).abs().max()) for name in found[0]}
    ended = {name: float((after[name] - found[1][name]).abs().max()) for name in after}
    return worst, ended, slots


def through_a_checkpoint(rank, ranks, folder):
    """Case: a moved model is saved, moved on, and read again; what both hold."""
    model, optimizer, _ = made(ranks)
    running = Rebalancing(model, optimizer, Shuffles(2, EXPERTS, ranks))
    steps(model, optimizer, None, 0, 3, rank, ranks, running)
    before = results(model, optimizer, rank, ranks)
    save_sharded(Path(folder) / "checkpoint-3", model, optimizer)
    steps(model, optimizer, None, 3, 6, rank, ranks, running)
    slots = model.layers[0].experts.slots
    load_sharded(Path(folder) / "checkpoint-3", model, optimizer)
    assert model.layers[0].experts.slots is slots
    after = results(model, optimizer, rank, ranks)
    other, fresh, _ = made(1)
    load_sharded(Path(folder) / "checkpoint-3", other, fresh)
    return before, after, results(other, fresh, rank, ranks)


def refused(rank, ranks, what):
    """Case: what a rebalancing that cannot work raises."""
    kind = partial(Each, [nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)]) if what == "modules" else FFN
    model = Model(kind) if what == "whole" else shard(Model(kind), ep=ranks)
    optimizer = torch.optim.AdamW(model.parameters())
    shuffles = Shuffles(3 if what == "layers" else 2, 4 if what == "experts" else EXPERTS, ranks)
    if what == "replicas":
        shuffles.spare = 1
    if what == "spare":
        shuffles.placement = Placement(torch.arange(EXPERTS + ranks).expand(2, -1) % EXPERTS, ranks, EXPERTS)
    try:
        Rebalancing(model, optimizer, shuffles)
    except ValueError as error:
        return str(error)
    return None


def rebalancer(model, ep, length, shadows=0):
    """One whose devices compute so slowly that balance is worth a move; experts are found where few tokens are."""
    device = DEVICES["h100"]
    link = Link(bandwidth=1e15, latency=0.0)
    cluster = Cluster(nodes=1, devices_per_node=ep, device=device, intra=link, inter=link)
    shape = ModelShape.of(model)
    step = Step(shape=shape, cluster=cluster, workload=Workload.balanced(shape.num_experts), length=length,
                target=TARGETS["transformers"])  # fmt: skip
    placed = Placed(step, Layout(fsdp=ep, ep=ep, micro_batch=4096))
    return Rebalancer(placed, steps=40, every=2, shadows=shadows)


def of_trainer(rank, ranks, folder, name, sizes, moves, shadows=0):
    """Case: losses and whole weights of a training by the engine of transformers, and how often experts moved."""
    warnings.simplefilter("ignore")
    _forget_accelerate()
    model = BUILD[name]()
    if moves == "pays":
        for key, bias in model.named_buffers():
            if key.endswith("selection_bias"):  # scores are at most 1: every token chooses the first two experts
                bias.copy_(torch.linspace(2, -2, len(bias)))
    chosen = rebalancer(model, ranks, 12, shadows) if moves == "pays" else Shuffles(2, 4, ranks, shadows)
    moving = Rebalance(chosen)
    seen = []
    original = moving.on_step_end

    def kept(*args, **kwargs):
        original(*args, **kwargs)
        seen.append(dict(moving.running.moves))

    moving.on_step_end = kept
    made = train(
        folder, lambda: distribute(model, sizes), 1, *([moving] if moves else []),
        sparse=SparseArguments(balance=0.0 if moves == "pays" else 0.1),
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
        max_steps=STEPS, optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0,
        adam_epsilon=1e-5,  # so that gradients that are rounding alone take no steps of their own
        data_size=96, ddp_timeout=30,
    )  # fmt: skip
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    weights = {key: whole(p) for key, p in made.model.named_parameters()}
    return losses, weights, len(seen[-1]) if seen else 0
