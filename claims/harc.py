"""HARC (arXiv 2606.03391): calibrating the routers of merged sparse models undoes part of what merging broke.

A small byte-level model with 8 experts, top-2, learns two domains of real text, and is branched; each branch goes on
with one domain alone. The mean of the branches' weights is the merged model, as Branch-Train-MiX merges all but its
experts. Its routers are then calibrated on 16 blocks of training text of each domain. "Misrouted" is the share of
choices that the branch of the domain makes otherwise, on held-out text.

Reproduced if calibration lowers the mean held-out loss of the merged model in every seed. Predicted before the first
run: reproduced, and by less than a tenth of what the merge costs, as branches so young still agree in their routers.

    python claims/harc.py   3 seeds, about half a minute each on a free core; appends to claims/results/harc.csv
"""

from __future__ import annotations

import argparse
import copy
from statistics import fmean

import torch
from common.statistics import paired
from common.text import text_by_domain
from common.training import average, drawn, held_out, of_domain, train
from densemixer import BASE_RATE, BATCH, CAP, LENGTH, choices, differing, model
from results import append
from torch import Tensor, nn

from moeify.compose import calibrate_routers

DOMAINS = ("novel", "code_python")
BASE, BRANCH, RATE, CALIBRATION = 200, 150, 2e-3, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learnt_part, unseen_part = text_by_domain(DOMAINS, CAP, LENGTH)
    learnt = {domain: of_domain(learnt_part, domain) for domain in DOMAINS}
    unseen = {domain: of_domain(unseen_part, domain)[:128] for domain in DOMAINS}
    ends: dict[str, list[float]] = {}
    for seed in options.seeds:
        torch.manual_seed(seed)
        everything = drawn(torch.cat(list(learnt.values())), batch=BATCH)
        base = train(model(), everything, BASE, seed, BASE_RATE)
        branches: dict[str, nn.Module] = {
            domain: train(copy.deepcopy(base), drawn(ids, batch=BATCH), BRANCH, seed + 100, RATE)
            for domain, ids in learnt.items()
        }
        merged = average(list(branches.values()))
        sample = {domain: list(ids[:CALIBRATION].split(BATCH)) for domain, ids in learnt.items()}
        calibrated = calibrate_routers(copy.deepcopy(merged), branches, sample)
        for arm, found in (("base", base), ("merged", merged), ("merged, routers calibrated", calibrated)):
            everywhere = dict.fromkeys(DOMAINS, found)
            ends.setdefault(arm, []).append(report(seed, arm, everywhere, branches, unseen, options.hardware))
        report(seed, "branch of the domain", branches, branches, unseen, options.hardware)
    print("calibrated - merged:", paired(ends["merged, routers calibrated"], ends["merged"]))


def report(
    seed: int, arm: str, models: dict[str, nn.Module], branches: dict[str, nn.Module], unseen: dict[str, Tensor],
    hardware: str,
) -> float:  # fmt: skip
    """Add the row of an arm, and return its mean loss."""
    losses = {domain: held_out(models[domain], ids) for domain, ids in unseen.items()}
    misrouted = fmean(
        differing(choices(models[domain], ids[:32]), choices(branches[domain], ids[:32]))
        for domain, ids in unseen.items()
    )
    append("harc", {
        "arm": arm, "seed": seed, **{f"loss_{domain}": f"{loss:.4f}" for domain, loss in losses.items()},
        "loss_mean": f"{fmean(losses.values()):.4f}", "misrouted": f"{misrouted:.4f}",
        "hardware": hardware, "result": "run",
    })  # fmt: skip
    print(f"seed {seed}  {arm:28} {fmean(losses.values()):.4f}  misrouted {misrouted:.4f}", flush=True)
    return fmean(losses.values())


if __name__ == "__main__":
    main()
