"""DeepSeekMoE (arXiv 2401.06066, section 4.4): more, finer experts at equal parameters and FLOPs lower the loss.

A small byte-level Llama with 8 experts of width 128, of which 2 run, 16 of 64 (4 run), 32 of 32 (8 run), and the last
with one of its running experts shared by all tokens, on the text that came with Python and torch. Weights are doubled
sigmoids, with which the experts together start as loud in every arm. Design, prediction and thresholds are in
claims/designs.md, written before the first run.

Reproduced if the mean loss of 32 is below that of 8, and falls from 8 to 16 to 32 (0.005 of noise allowed).

    python claims/fine_grained.py     3 seeds, about 5 minutes on one core; rows in claims/results/fine_grained.csv
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import fmean

import torch
from common.small import BATCH, LENGTH, llama, text
from common.statistics import paired
from common.training import drawn, held_out, train
from results import append
from torch import nn

from moeify import Recipe, sparsify
from moeify.flops import count
from moeify.routers import TopK, sigmoid
from moeify.sparsify import fresh, nothing

DENSE = 256
ARMS = {"8, top-2": (2, False), "16, top-4": (4, False), "32, top-8": (8, False), "32, top-8, 1 shared": (8, True)}
"""By how much finer than the dense width experts are, which is k too, and whether one of them is shared."""


def built(finer: int, shares: bool) -> nn.Module:
    shared = partial(of_width, hidden=DENSE // finer) if shares else nothing
    router = partial(TopK, k=finer - shares, score=sigmoid, normalize=False, scale=2.0)
    experts = partial(fresh, granularity=finer)
    recipe = Recipe(num_experts=4 * finer - shares, router=router, experts=experts, shared=shared)
    return sparsify(llama(DENSE), recipe, verbose=False)


def of_width(dense: nn.Module, width: int, *, hidden: int) -> nn.Module:
    """A network as the dense one, with fewer hidden units."""
    return llama(hidden).get_submodule("model.layers.0.mlp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learnt, unseen = text()
    ends: dict[str, list[float]] = {arm: [] for arm in ARMS}
    rows = []
    for seed in options.seeds:
        for arm, (finer, shares) in ARMS.items():
            torch.manual_seed(seed)
            began = time.process_time()
            model = train(built(finer, shares), drawn(learnt, batch=BATCH), options.steps, seed, options.rate)
            ends[arm].append(held_out(model, unseen))
            counted = count(model)
            rows.append({
                "hardware": options.hardware, "arm": arm, "seed": seed, "steps": options.steps,
                "tokens": options.steps * BATCH * LENGTH, "rate": options.rate, "loss": f"{ends[arm][-1]:.4f}",
                "parameters": counted.parameters, "flops": counted.flops,
                "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    coarse, middle, fine, shared = ends.values()
    for arm, losses in ends.items():
        print(f"{arm}: {fmean(losses):.4f}, less the coarsest {paired(losses, coarse)}")
    print("shared - none:", paired(shared, fine))
    falls = fmean(middle) <= fmean(coarse) + 0.005 and fmean(fine) <= fmean(middle) + 0.005
    result = "reproduced" if falls and fmean(fine) < fmean(coarse) else "failed"
    print(result)
    for row in rows:
        append("fine_grained", row | {"result": result})


if __name__ == "__main__":
    main()
