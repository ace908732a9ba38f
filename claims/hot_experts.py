"""Hot experts in a training on two processes: what moving or lending them gains, measured and as the planner says.

A Llama of two sparse layers takes steps on two processes of one machine, joined by gloo, four experts on each. Routers
draw experts at random by fixed shares: one hot expert (60 %), a hot half (all four of the first process, 20 % each), or
Zipf's law. Experts lie in their order, are moved to even out the processes (`permuted`), or the hottest is lent to the
other process as a shadow (`shadowed`). Arms take their steps by turns.

Measured is the CPU time of the busier process, which does not count waiting: the time of a step where every process has
a core. The planner describes a core by `moeify.parallel.measure` in CPU time. Reproduced if the arm that it predicts to
be fastest is the fastest one for each routing, and each of its ratios to experts in their order is within 10 % of the
measured one; in part if only the first holds.

    python claims/hot_experts.py --hardware NAME      five minutes on two cores; rows in claims/results/hot_experts.csv
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from common.processes import Rows, rows_of_processes
from jaxtyping import Float
from results import append
from torch import Tensor, distributed
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Recipe, sparsify
from moeify.context import Context
from moeify.parallel import TARGETS, Layout, Link, ModelShape, Placed, Placement, Step, Workload, measure, shard
from moeify.parallel.cost import OF_SPARSE
from moeify.parallel.moving import move_experts
from moeify.parallel.place import permuted, shadowed
from moeify.parallel.rebalance import with_spare
from moeify.routers.base import Router, real_tokens
from moeify.routing import Assignment
from moeify.sparsify import fresh

PROCESSES, LAYERS, EXPERTS, WORDS = 2, 2, 8, 512
SEQUENCES, LENGTH = 16, 128

ROUTINGS = {
    "one hot expert": torch.tensor([0.6] + [0.4 / 7] * 7, dtype=torch.float64),
    "a hot half": torch.tensor([0.2] * 4 + [0.05] * 4, dtype=torch.float64),
    "Zipf": Workload.skewed(EXPERTS, 1.0).shares[0, 0].sort(descending=True).values,
}


class Drawn(Router):
    """One expert for every token, drawn by fixed shares."""

    def __init__(self, width: int, num_experts: int, *, shares: Float[Tensor, "E"]) -> None:
        super().__init__()
        self.num_experts, self.k = num_experts, 1
        self.register_buffer("shares", shares)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        tokens = real_tokens(x, context)
        chosen = self.shares.multinomial(len(tokens.x), replacement=True)[:, None]
        return tokens.assign(chosen, torch.ones(chosen.shape), self.num_experts)


def placements(shares: Float[Tensor, "E"]) -> dict[str, Placement]:
    still = Placement.contiguous(LAYERS, EXPERTS, PROCESSES)
    rows = shares.expand(LAYERS, -1)
    return {
        "in order": still, "moved": permuted(rows, still),
        "lent": shadowed(rows, with_spare(still, EXPERTS + PROCESSES)),
    }  # fmt: skip


def predicted(step: Step, layout: Layout, shares: Float[Tensor, "E"], placement: Placement) -> float:
    """Seconds of a step of the training with experts in this placement."""
    calm = replace(step, workload=Workload.balanced(EXPERTS)).price(layout)
    rest = sum(seconds for kind, seconds in calm.seconds.items() if kind not in OF_SPARSE)
    return rest + float(Placed(step, layout, shadows=True).seconds(placement, shares.expand(1, LAYERS, -1)).sum())


def process(rank: int, name: str, rounds: int) -> Rows:
    """What a process does: train by turns in every placement; what it took and what was predicted."""
    described = measure(size=512, clock=time.process_time)
    half = Link(bandwidth=described.intra.bandwidth / 2, latency=described.intra.latency)  # it counts 2 bytes of 4
    cluster = replace(described, nodes=1, devices_per_node=PROCESSES, intra=half, inter=half)
    shares = ROUTINGS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=4,
        attn_implementation="eager",
    )  # fmt: skip  # pyrefly: ignore
    recipe = Recipe(num_experts=EXPERTS, experts=fresh, router=partial(Drawn, shares=shares))
    model = sparsify(LlamaForCausalLM(config), recipe, verbose=False).train()
    step = Step(
        shape=ModelShape.of(model), cluster=cluster, workload=Workload.counted(shares[None, None]), length=LENGTH,
        target=TARGETS["torchtitan"],
    )  # fmt: skip
    layout = Layout(fsdp=PROCESSES, ep=PROCESSES, micro_batch=SEQUENCES)
    shard(model, ep=PROCESSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(WORDS, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(rank))
    arms = placements(shares)
    cpu: dict[str, list[float]] = {arm: [] for arm in arms}
    wall: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm, placement in arms.items():
            move_experts(model, placement, optimizer)
            for again in range(3):
                distributed.barrier()
                started = time.process_time(), time.perf_counter()
                model(ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                spent = torch.tensor([time.process_time() - started[0], time.perf_counter() - started[1]])
                distributed.all_reduce(spent, distributed.ReduceOp.MAX)
                if turn and again:
                    cpu[arm].append(float(spent[0]))
                    wall[arm].append(float(spent[1]))
    seconds = {arm: predicted(step, layout, shares, placement) for arm, placement in arms.items()}
    rows = []
    for arm, placement in arms.items():
        ratios = sorted(one / other for one, other in zip(cpu["in order"], cpu[arm], strict=True))
        rows.append({
            "routing": name, "arm": arm, "load": float(placement.load(shares.expand(LAYERS, -1)).mean()),
            "steps": len(ratios), "milliseconds": 1e3 * median(cpu[arm]), "wall_ms": 1e3 * median(wall[arm]),
            "predicted_ms": 1e3 * seconds[arm], "speedup": median(ratios), "low": ratios[len(ratios) // 4],
            "high": ratios[3 * len(ratios) // 4], "predicted": seconds["in order"] / seconds[arm],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="what it runs on, for the rows")
    parser.add_argument("--rounds", type=int, default=20, help="turns of every arm, of two steps each")
    options = parser.parse_args()
    found = [
        row
        for name in ROUTINGS
        for row in rows_of_processes(PROCESSES, partial(process, name=name, rounds=options.rounds))
    ]
    by_routing = [[row for row in found if row["routing"] == name] for name in ROUTINGS]
    fastest = all(
        max(rows, key=lambda row: row["speedup"]) is max(rows, key=lambda row: row["predicted"]) for rows in by_routing
    )
    near = all(abs(row["predicted"] / row["speedup"] - 1) <= 0.1 for row in found)
    result = "reproduced" if fastest and near else "in part" if fastest else "failed"
    for row in found:
        shown = {key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
        print(*shown.values())
        append("hot_experts", {"hardware": options.hardware} | shown | {"result": result})
    print(result)


if __name__ == "__main__":
    main()
