"""Switch (arXiv 2101.03961, figure 4): at equal FLOPs per token, more experts lower the loss at every doubling.

A small byte-level Llama, dense and with top-1 of 2 to 32 experts of the dense width, on the text that came with Python
and torch, at equal tokens. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if the mean loss falls at every doubling from 2 to 32 experts (0.005 of noise allowed) and the best is 0.03
nats per byte ahead of dense. Predicted: not reproduced, as 32 experts see too few bytes each.

    python claims/switch_scaling.py     3 seeds, about 6 minutes on one core; rows in claims/results/switch_scaling.csv
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import pairwise
from statistics import fmean

import torch
from common.small import BATCH, LENGTH, llama, text
from common.statistics import paired
from common.training import drawn, held_out, train
from results import append
from torch import nn

from moeify import Recipe, sparsify
from moeify.flops import count
from moeify.routers import TopK
from moeify.sparsify import fresh

EXPERTS = (1, 2, 4, 8, 16, 32)
"""1 is the dense model."""


def built(num_experts: int) -> nn.Module:
    if num_experts == 1:
        return llama()
    router = partial(TopK, k=1, normalize=False)
    return sparsify(llama(), Recipe(num_experts=num_experts, router=router, experts=fresh), verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learnt, unseen = text()
    ends: dict[int, list[float]] = {experts: [] for experts in EXPERTS}
    rows = []
    for seed in options.seeds:
        for experts in EXPERTS:
            torch.manual_seed(seed)
            began = time.process_time()
            model = train(built(experts), drawn(learnt, batch=BATCH), options.steps, seed, options.rate)
            ends[experts].append(held_out(model, unseen))
            counted = count(model)
            rows.append({
                "hardware": options.hardware, "experts": experts, "seed": seed, "steps": options.steps,
                "tokens": options.steps * BATCH * LENGTH, "rate": options.rate, "loss": f"{ends[experts][-1]:.4f}",
                "parameters": counted.parameters, "flops": counted.flops,
                "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    means = [fmean(ends[experts]) for experts in EXPERTS]
    falls = all(after <= before + 0.005 for before, after in pairwise(means[1:]))
    result = "reproduced" if falls and means[0] - min(means[1:]) >= 0.03 else "failed"
    for experts in EXPERTS[1:]:
        print(f"E={experts}: {fmean(ends[experts]):.4f}, less dense {paired(ends[experts], ends[1])}")
    print(result)
    for row in rows:
        append("switch_scaling", row | {"result": result})


if __name__ == "__main__":
    main()
