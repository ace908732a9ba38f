"""Soft MoE (arXiv 2308.00951): slots that mix all patches beat routing of patches, at a step time flat in experts.

Photographs of caltech101-64 at 32 pixels, 64 patches, and a small vision transformer whose last two of four layers are
sparse: top-1 of 8 experts and expert choice of 8 (one expert per patch on average), Soft MoE of 8 experts with 8 slots
and of 32 with 2, and the dense model. Reported are the accuracy on test photographs and the CPU time of a training step
of both Soft MoEs, by turns. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if Soft MoE of 8 experts is ahead of top-1 in the mean, and a step with 32 experts takes less than 1.5 times
that with 8.

    python claims/soft_moe.py     3 seeds, about 25 minutes on one core; rows in claims/results/soft_moe.csv
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import fmean, median

import torch
from common.images import BATCH, PATCHES, Images, compared, step, vit
from common.small import options
from common.statistics import paired
from common.training import balanced
from results import append
from torch import nn

from moeify import Recipe, sparsify
from moeify.find import last_half
from moeify.routers import ExpertChoice, Router, Soft, TopK
from moeify.sparsify import fresh

ROUNDS = 7


def built(router: Callable[[int, int], Router], num_experts: int) -> nn.Module:
    recipe = Recipe(where=last_half, num_experts=num_experts, router=router, experts=fresh)
    return sparsify(vit(), recipe, verbose=False)


def soft(num_experts: int) -> nn.Module:
    return built(partial(Soft, slots=PATCHES // num_experts), num_experts)


ARMS: dict[str, Callable[[], nn.Module]] = {
    "dense": vit,
    "top-1": lambda: built(partial(TopK, k=1, normalize=False), 8),
    "expert choice": lambda: built(partial(ExpertChoice, factor=1.0), 8),
    "Soft, 8 experts": lambda: soft(8),
    "Soft, 32 experts": lambda: soft(32),
}


def seconds(arms: tuple[str, ...]) -> dict[str, float]:
    """Median CPU time of a forward and backward pass of a batch, the arms by turns."""
    images = Images(torch.randn(BATCH, 3, 32, 32), torch.randint(97, (BATCH,)))
    models = {arm: ARMS[arm]().train() for arm in arms}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(ROUNDS + 1):
        for arm, model in models.items():
            began = time.process_time()
            step(model, images).backward()
            if turn:
                taken[arm].append(time.process_time() - began)
    return {arm: median(values) for arm, values in taken.items()}


def main() -> None:
    chosen = options(__doc__, steps=600)
    torch.set_num_threads(1)
    taken = seconds(tuple(ARMS))
    found, rows = compared(ARMS, chosen, balancing={"top-1": balanced})
    for arm, values in found.items():
        print(f"{arm}: {fmean(values):.2f} %, a step {1000 * taken[arm]:.0f} ms; Soft, 8 experts less it", end=" ")
        print(paired(found["Soft, 8 experts"], values))
    ratio = taken["Soft, 32 experts"] / taken["Soft, 8 experts"]
    ahead = fmean(found["Soft, 8 experts"]) > fmean(found["top-1"])
    result = "reproduced" if ahead and ratio < 1.5 else "failed"
    print(f"a step with 32 experts takes {ratio:.2f} times that with 8: {result}")
    for row in rows:
        append("soft_moe", row | {"step_cpu_ms": f"{1000 * taken[row['arm']]:.1f}", "result": result})


if __name__ == "__main__":
    main()
