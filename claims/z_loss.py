"""ST-MoE (arXiv 2202.08906, section 3.3): the z-loss keeps logits small and training stable, at no price in quality.

Eight experts, top-2, at four learning rates without clipping of gradients, and three weights of the z-loss, on the text
that came with Python and torch. A run is stable if it ends at most 0.3 nats per byte above the best rate of its
seed without z-loss. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if 1e-3 has at least as many stable runs as no z-loss, and costs less than 0.02 nats per byte at the best
rate.

    python claims/z_loss.py     3 seeds, about 5 minutes on one core; rows in claims/results/z_loss.csv
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from statistics import fmean

import torch
from common.small import BATCH, LENGTH, llama, text
from common.statistics import paired
from common.training import balanced, drawn, held_out, train
from results import append
from torch import Tensor, nn

from moeify import Recipe, losses, record, sparsify
from moeify.routers import TopK
from moeify.routing import Routing
from moeify.sparsify import fresh

RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
WEIGHTS = (0.0, 1e-3, 1e-2)
UNSTABLE = 0.3


def built() -> nn.Module:
    recipe = Recipe(num_experts=8, router=partial(TopK, k=2), experts=partial(fresh, granularity=2))
    return sparsify(llama(), recipe, verbose=False)


def with_z(routing: Routing, weight: float) -> Tensor:
    return balanced(routing) + weight * losses.z(routing)


@torch.no_grad()
def squared_logsumexp(model: nn.Module, ids: Tensor) -> float:
    """The mean over tokens and layers, which is what the z-loss lowers."""
    with record(model.eval()) as decisions:
        model(input_ids=ids)
    return fmean(losses.z(routing).item() for routing in decisions.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = text()
    found: dict[tuple[float, float, int], tuple[float, float]] = {}
    rows = []
    for seed in options.seeds:
        for z in WEIGHTS:
            for rate in RATES:
                torch.manual_seed(seed)
                began = time.process_time()
                batches = drawn(data.learnt, batch=BATCH)
                model = train(
                    built(), batches, options.steps, seed, rate, balancing=partial(with_z, weight=z), clip=math.inf
                )
                loss, size = held_out(model, data.unseen), squared_logsumexp(model, data.unseen[:32])
                found[z, rate, seed] = (loss if math.isfinite(loss) else math.inf), size
                rows.append({
                    "hardware": options.hardware, "z": z, "rate": rate, "seed": seed, "steps": options.steps,
                    "tokens": options.steps * BATCH * LENGTH, "loss": f"{loss:.4f}",
                    "squared_logsumexp": f"{size:.4g}", "cpu_seconds": f"{time.process_time() - began:.0f}",
                    "corpus": data.corpus,
                })  # fmt: skip
                print(*rows[-1].values(), flush=True)
    best = {(z, seed): min(found[z, rate, seed][0] for rate in RATES) for z in WEIGHTS for seed in options.seeds}
    stable = {
        z: sum(found[z, rate, seed][0] <= best[0.0, seed] + UNSTABLE for rate in RATES for seed in options.seeds)
        for z in WEIGHTS
    }
    ends = {z: [best[z, seed] for seed in options.seeds] for z in WEIGHTS}
    for z in WEIGHTS:
        runs = len(RATES) * len(options.seeds)
        print(f"z {z}: {stable[z]} of {runs} stable, at the best rate less none {paired(ends[z], ends[0.0])}")
    costs = fmean(ends[1e-3]) - fmean(ends[0.0])
    result = "reproduced" if stable[1e-3] >= stable[0.0] and costs < 0.02 else "failed"
    print(result)
    for row in rows:
        of = (row["z"], row["rate"], row["seed"])
        is_stable = found[of][0] <= best[0.0, row["seed"]] + UNSTABLE
        append("z_loss", row | {"stable": is_stable, "result": result})


if __name__ == "__main__":
    main()
