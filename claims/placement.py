"""Replicas lie where EPLB puts them, and moving experts never makes a replay slower.

Two things are checked. (1) `replicated` gives the placement that `eplb.py` of deepseek-ai/EPLB (MIT) gives for the same
counts, slot by slot, on 60 random cases of 8 to 256 experts, 4 to 32 ranks and 1 to 4 nodes, with and without groups.
(2) Replays of every layer of two real traces (one conversation of 156 tokens each, cut into 60 steps), and of six kinds
of synthetic routing, on described H100: with a `Rebalancer`, moves included, none takes longer than with experts left
where they are. The routing that turns at every decision is made to mislead. One replay has 512 devices.

The thresholds of the `Rebalancer` were chosen on these kinds of routing, with other seeds: (2) is a check, and no
prediction.

    python claims/placement.py --eplb eplb.py      a minute on one core; rows in claims/results/placement.csv
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from types import ModuleType

import torch
from common.published import parse
from jaxtyping import Float
from results import append
from torch import Tensor

from moeify.data.claim_files import data_file
from moeify.inspect.formats import read_trace
from moeify.parallel import (
    DEVICES,
    TARGETS,
    Cluster,
    Layout,
    Link,
    ModelShape,
    Placed,
    Rebalancer,
    Simulation,
    Step,
    Workload,
    replicated,
    simulate,
)

CASES = [
    (8, 8, 8, 1, 1),
    (12, 16, 8, 2, 4),
    (16, 32, 4, 2, 8),
    (64, 64, 16, 4, 4),
    (64, 72, 8, 1, 1),
    (256, 288, 32, 4, 8),
]
"""Experts, slots, ranks, nodes and groups."""
SYNTHETIC_LAYERS, STEPS, EXPERTS = 8, 200, 64


def load(file: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location("eplb", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def equal(eplb: ModuleType) -> tuple[int, int]:
    generator, same, cases = torch.Generator().manual_seed(0), 0, 0
    for experts, slots, ranks, nodes, groups in CASES:
        for turn in range(10):
            counts = torch.rand(3, experts, generator=generator) ** (1 + turn % 4) * 1000
            counts = counts.round() if turn % 2 else counts
            theirs, _, _ = eplb.rebalance_experts(counts, slots, groups, nodes, ranks)
            same += torch.equal(replicated(counts, slots, ranks, nodes=nodes, groups=groups).experts, theirs)
            cases += 1
    return same, cases


def routings(seed: int) -> dict[str, Float[Tensor, "S L E"]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for model in ("qwen", "gemma"):
        trace = read_trace(data_file(f"routing-traces/{model}.route.csv.gz"))
        found[model] = Workload.traced(trace, snapshots=60).shares
    zipf = Workload.skewed(EXPERTS, 0.8, layers=SYNTHETIC_LAYERS, seed=seed).shares
    size = (STEPS, SYNTHETIC_LAYERS, EXPERTS)

    def turning(every: int) -> Float[Tensor, "S L E"]:
        orders = [torch.randperm(EXPERTS, generator=generator) for _ in range(STEPS // every)]
        return torch.cat([zipf[:, :, order].expand(every, -1, -1) for order in orders])

    return found | {
        "balanced": torch.ones(size), "lasting": zipf.expand(STEPS, -1, -1),
        "drifting": (zipf.log() + torch.randn(size, generator=generator).cumsum(0) * 0.02).softmax(-1),
        "noise": torch.rand(size, generator=generator) ** 2, "turns at decisions": turning(10), "turns": turning(50),
    }  # fmt: skip


def replay(shares: Float[Tensor, "S L E"], nodes: int, ep: int, spare: int) -> Simulation:
    _, layers, experts = shares.shape
    shape = ModelShape(
        name="as Qwen3-30B-A3B", width=2048, blocks=layers, sparse_layers=layers, num_experts=experts, k=8.0,
        hidden=768.0, dense_parameters=9e8, embedding=6e8, dense_flops=1.8e9, head_flops=6e8, attention_flops=8e5,
        vocabulary=150000,
    )  # fmt: skip
    cluster = Cluster(
        nodes=nodes, devices_per_node=8, device=DEVICES["h100"], intra=Link(bandwidth=350e9, latency=1e-5),
        inter=Link(bandwidth=45e9, latency=2e-5),
    )  # fmt: skip
    even = Workload.balanced(experts)
    step = Step(shape=shape, cluster=cluster, workload=even, length=4096, target=TARGETS["megatron"])
    layout = Layout(fsdp=8 * nodes, ep=ep)
    return simulate(step, layout, shares, Rebalancer(Placed(step, layout), steps=len(shares), spare=spare))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    options = parse(parser, "eplb", "eplb.py of deepseek-ai/EPLB")
    torch.set_num_threads(1)
    same, cases = equal(load(options.eplb))
    print(f"EPLB: {same} of {cases} placements are equal")
    rows = []
    for name, shares in routings(options.seed).items():
        real = name in ("qwen", "gemma")
        sizes = [(4, 8, 0), (4, 8, 1), (4, 32, 1)] if real else [(1, 8, 0), (1, 8, 1)]
        for nodes, ep, spare in sizes + ([(64, 64, 1)] if name == "qwen" else []):
            started = time.perf_counter()
            found = replay(shares, nodes, ep, spare)
            rows.append({
                "seed": options.seed, "routing": name, "devices": 8 * nodes, "ep": ep, "spare": spare,
                "steps": len(shares), "moves": len(found.moves),
                "gb": f"{sum(move.bytes for move in found.moves.values()) / 1e9:.1f}",
                "seconds_static": f"{float(found.static.sum()):.3f}", "seconds": f"{float(found.seconds.sum()):.3f}",
                "speedup": f"{found.speedup:.4f}", "replayed_in": f"{time.perf_counter() - started:.1f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    never = all(float(row["speedup"]) >= 1 for row in rows)
    result = "reproduced" if same == cases and never else "failed"
    print(result)
    for row in rows:
        append("placement", {"hardware": "none"} | row | {"eplb_equal": f"{same} of {cases}", "result": result})


if __name__ == "__main__":
    main()
