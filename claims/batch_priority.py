"""V-MoE (arXiv 2106.05974, section 4): as capacity falls, batch priority drops the patches that matter least.

A small vision transformer with the recipe `vmoe` learns the scans of digits that come with scikit-learn, a patch per
pixel. The same model is then evaluated with less and less capacity, and slots given by arrival or by batch priority.
Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if batch priority is ahead of arrival by a point of accuracy or more in the mean over capacity factors of 0.3
and less, in every seed.

    python claims/batch_priority.py     3 seeds, about 3 minutes on one core; rows in claims/results/batch_priority.csv
"""

from __future__ import annotations

import argparse
import time
from statistics import fmean

import torch
from common.images import Images, accuracy, train, vit
from common.rates import UNREPORTED, add_rates, parted, rates_of
from common.statistics import paired
from results import append
from torch import Tensor, nn

from moeify import losses, sparsify
from moeify.routing import Routing
from moeify.serve import serve_with
from moeify.sparsify import recipes

FACTORS = (4.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
PRIORITIES = {"arrival": "choice", "batch": "batch"}
"""`choice` is V-MoE's order without batch priority: first choices before second ones, then the earliest."""
HELD_OUT, WEIGHT = 500, 0.005


def digits() -> Images:
    """1,797 scans of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return Images(torch.tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(scans.target))


def built() -> nn.Module:
    model = vit(size=8, patch=1, channels=1, width=32, labels=10)
    return sparsify(model, recipes["vmoe"], verbose=False)


def balancing(routing: Routing) -> Tensor:
    """Both losses of V-MoE."""
    return WEIGHT * (losses.score_importance(routing) + losses.load_loss(routing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    add_rates(parser, 2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    unseen, learnt = images[order[:HELD_OUT]], images[order[HELD_OUT:]]
    rest, most = (learnt[at] for at in parted(len(learnt), 4))

    def run(seed: int, rate: float, images: Images) -> nn.Module:
        torch.manual_seed(seed)
        return train(built(), images, options.steps, seed, rate, balancing=balancing)

    rates = rates_of(
        "batch_priority", ["vmoe"], options, lambda _, rate: 100 - accuracy(run(UNREPORTED, rate, most), rest)
    )
    low: dict[str, list[float]] = {name: [] for name in PRIORITIES}
    rows = []
    for seed in options.seeds:
        began = time.process_time()
        model = run(seed, rates["vmoe"], learnt)
        seconds = time.process_time() - began
        for name, priority in PRIORITIES.items():
            found = {}
            for factor in FACTORS:
                serve_with(model, capacity=factor, priority=priority)
                found[factor] = accuracy(model, unseen)
                rows.append({
                    "hardware": options.hardware, "seed": seed, "steps": options.steps, "priority": name,
                    "factor": factor, "accuracy": f"{found[factor]:.1f}", "cpu_seconds_of_training": f"{seconds:.0f}",
                    "rate": rates["vmoe"],
                })  # fmt: skip
            low[name].append(fmean(found[factor] for factor in FACTORS if factor <= 0.3))
            print(f"seed {seed} {name:8}", *(f"{factor}: {value:.1f}" for factor, value in found.items()), flush=True)
    ahead = [batch - arrival for batch, arrival in zip(low["batch"], low["arrival"], strict=True)]
    result = "reproduced" if min(ahead) >= 1 else "failed"
    print("batch - arrival at 0.3 and less:", paired(low["batch"], low["arrival"]), result)
    for row in rows:
        append("batch_priority", row | {"result": result})


if __name__ == "__main__":
    main()
