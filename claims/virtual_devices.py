"""The planner ranks layouts that are run here: processes of one machine as virtual devices, joined by gloo.

Tiny sparse models take steps on 2, 4 and 8 processes: replicas, FSDP2, and experts divided among 2, 4 and 8 of them,
each with several divisions of the sequences into micro-batches. Measured is the CPU time of a step over all processes,
divided by the cores: the time of a step where nothing else runs. A core is described by `moeify.parallel.measure` in
CPU time, and every virtual device has its part of one: a quarter where 8 share 2. The planner counts 2 bytes per number
where these processes exchange 4, so links are described as half as fast.

Layouts are timed in rounds, one after the other, for as long as `--minutes` allows. Noise of the measured times bounds
the correlation that any prediction can have: its ceiling is the square root of the reliability of the mean over rounds
(correction for attenuation, Spearman 1904), which follows from the rank correlation of even and odd rounds
(Spearman-Brown). It is printed and kept beside the correlation.

Reproduced if the rank correlation of predicted and measured times is at least 0.9 for every model and number of
processes; in part if it is for some. The first try, of the model `first`, failed (commit 6c2061a, and its expectation
in the same file); designs and predictions of the second, of `wide` and `deep`, and of the third, of `narrow` and
`broad`, are in claims/designs.md.

    python claims/virtual_devices.py --hardware NAME --minutes 8   rows in claims/results/virtual_devices_3.csv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch
from common.processes import Rows, rows_of_processes
from common.statistics import rank_correlation
from results import append
from torch import distributed, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moeify import Recipe, record, sparsify
from moeify.parallel import TARGETS, Layout, Link, ModelShape, Step, Workload, measure, shard
from moeify.sparsify import fresh

WORLDS, WORDS = (2, 4, 8), 512
WARM, TURNS = 1, 3
CORES = 2


@dataclass(frozen=True)
class Model:
    """A model and the step that it takes."""

    experts: int
    sequences: int
    length: int
    micro_batches: tuple[int, ...]
    dense: Callable[[], PreTrainedModel]

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        return sparsify(self.dense(), Recipe(num_experts=self.experts, experts=fresh), verbose=False).train()


def llama(**sizes: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=WORDS, num_attention_heads=4, attn_implementation="eager", **sizes)  # pyrefly: ignore
    )


def gpt2(**sizes: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=64, n_head=4, attn_implementation="eager", **sizes))


MODELS = {
    "first": Model(
        8, 16, 64, (1, 2, 4, 8), partial(llama, hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    ),
    "wide": Model(
        16, 24, 48, (1, 2, 3, 6), partial(llama, hidden_size=192, intermediate_size=384, num_hidden_layers=2)
    ),
    "deep": Model(8, 24, 48, (1, 2, 3, 6), partial(gpt2, n_embd=64, n_layer=6)),
    "narrow": Model(32, 16, 40, (1, 2, 4), partial(llama, hidden_size=96, intermediate_size=96, num_hidden_layers=3)),
    "broad": Model(8, 16, 64, (1, 2, 4), partial(gpt2, n_embd=160, n_layer=3)),
}


def layouts(world: int, model: Model) -> list[Layout]:
    each = model.sequences // world
    found = []
    for accumulation in (n for n in model.micro_batches if each % n == 0):
        micro = {"micro_batch": each // accumulation, "accumulation": accumulation}
        found.append(Layout(dp=world, **micro))
        found += [Layout(fsdp=world, ep=ep, **micro) for ep in (1, 2, 4, 8) if world % ep == 0]
    return found


def sequences(rank: int, layout: Layout, model: Model) -> list[torch.Tensor]:
    """The micro-batches of a process."""
    ids = torch.randint(WORDS, (model.sequences, model.length), generator=torch.Generator().manual_seed(0))
    return list(ids.chunk(layout.world)[rank].split(layout.micro_batch))


def step_times(rank: int, layout: Layout, kind: Model) -> tuple[float, float]:
    """Median seconds of a step: CPU time of all processes by the cores, and wall time of the slowest."""
    model = shard(kind.built(), ep=layout.ep, fsdp=layout.dp == 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batches, cpu, wall = sequences(rank, layout, kind), [], []
    for turn in range(WARM + TURNS):
        distributed.barrier()
        started = time.process_time(), time.perf_counter()
        for i, ids in enumerate(batches):
            if layout.dp > 1:  # replicas reduce their gradients once
                model.set_requires_gradient_sync(i == len(batches) - 1)
            (model(ids, labels=ids).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        spent = torch.tensor([time.process_time() - started[0], time.perf_counter() - started[1]])
        longest = spent.clone()
        distributed.all_reduce(spent)
        distributed.all_reduce(longest, distributed.ReduceOp.MAX)
        if turn >= WARM:
            cpu.append(float(spent[0]) / CORES)
            wall.append(float(longest[1]))
    return median(cpu), median(wall)


def in_rounds(rank: int, found: list[Layout], kind: Model, seconds: float) -> list[list[tuple[float, float]]]:
    """Of every layout the times of at least two rounds, and of as many more as fit into some seconds."""
    times: list[list[tuple[float, float]]] = [[] for _ in found]
    began = time.monotonic()
    while True:
        for of_layout, layout in zip(times, found, strict=True):
            of_layout.append(step_times(rank, layout, kind))
        done, spent = len(times[0]), time.monotonic() - began
        enough = torch.tensor([float(done >= 2 and spent * (done + 1) / done > seconds)])
        distributed.broadcast(enough, 0)
        if enough.item():
            return times


def virtual_device(rank: int, world: int, name: str, seconds: float) -> Rows:
    """What a process does: describe the machine, then time every layout and predict it."""
    cluster = measure(size=512, clock=time.process_time).shared(CORES)
    half = Link(bandwidth=cluster.intra.bandwidth / 2, latency=cluster.intra.latency)
    cluster = type(cluster)(nodes=1, devices_per_node=world, device=cluster.device, intra=half, inter=half)
    kind = MODELS[name]
    whole = kind.built()
    with record(whole) as decisions, torch.no_grad():
        whole(torch.cat(sequences(0, Layout(micro_batch=kind.sequences), kind)))
    step = Step(
        shape=ModelShape.of(whole), cluster=cluster, workload=Workload.recorded(decisions), length=kind.length,
        target=TARGETS["torchtitan"],
    )  # fmt: skip
    rows, found = [], layouts(world, kind)
    for layout, times in zip(found, in_rounds(rank, found, kind, seconds), strict=True):
        cost = step.price(layout)
        rows.append({
            "model": name, "world": world, "layout": str(layout), "rounds": len(times), "predicted_ms": 1e3 * cost.step,
            "measured_ms": 1e3 * mean(cpu for cpu, _ in times), "wall_ms": 1e3 * mean(wall for _, wall in times),
            "even_ms": 1e3 * mean(cpu for cpu, _ in times[::2]), "odd_ms": 1e3 * mean(cpu for cpu, _ in times[1::2]),
            "without_fixed_ms": 1e3 * (cost.step - cost.seconds["fixed"]),
            "wall_of_plan": max(cost.seconds, key=cost.seconds.__getitem__),
        })  # fmt: skip
        if rank == 0:
            print(*(f"{v:.1f}" if isinstance(v, float) else v for v in rows[-1].values()), flush=True)
    return rows


def correlation(rows: Rows, measured: str = "measured_ms", by: str = "predicted_ms") -> float:
    predicted, found = (torch.tensor([row[name] for row in rows]) for name in (by, measured))
    return rank_correlation(predicted, found)


def ceiling(rows: Rows) -> float:
    """The rank correlation that the true times of the layouts would have with those measured here."""
    halves = max(correlation(rows, "even_ms", "odd_ms"), 0.0)
    return (2 * halves / (1 + halves)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="what it runs on, for the rows")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["narrow", "broad"])
    parser.add_argument("--processes", nargs="+", type=int, choices=WORLDS, default=WORLDS)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all cells together; each takes two rounds at least"
    )
    options = parser.parse_args()
    wanted = [(name, world) for name in options.models for world in options.processes]
    end, cells = time.monotonic() + 60 * options.minutes, {}
    for at, (name, world) in enumerate(wanted):
        left = end - time.monotonic()
        device = partial(virtual_device, world=world, name=name, seconds=left / (len(wanted) - at))
        cells[name, world] = rows_of_processes(world, device)
    found = {cell: correlation(rows) for cell, rows in cells.items()}
    good = sum(value >= 0.9 for value in found.values())
    result = "reproduced" if good == len(found) else "in part" if good else "failed"
    for name in options.models:
        rows = [row for cell, rows in cells.items() if cell[0] == name for row in rows]
        together = correlation(rows)
        print(f"{name}: all layouts {together:.3f}")
        for row in rows:
            shown = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in row.items()}
            cell = name, row["world"]
            append("virtual_devices_3", {"hardware": options.hardware} | shown | {
                "correlation": f"{found[cell]:.3f}", "ceiling": f"{ceiling(cells[cell]):.3f}",
                "all": f"{together:.3f}", "result": result,
            })  # fmt: skip
    for (name, world), value in found.items():
        others = [
            f"{correlation(cells[name, world], *which):.3f}"
            for which in (("wall_ms",), ("measured_ms", "without_fixed_ms"))
        ]
        most = ceiling(cells[name, world])
        print(f"{name}, {world} processes: rank correlation {value:.3f} of at most {most:.3f}; wall, no fixed {others}")
    print(result)


if __name__ == "__main__":
    main()
