"""Soft MoE (arXiv 2308.00951): slots that mix all patches beat routing of patches, at a step time flat in experts.

Photographs of caltech101-64 at 32 pixels, 64 patches, and a small vision transformer whose last two of four layers are
sparse: top-1 of 8 experts and expert choice of 8 (one expert per patch on average), Soft MoE of 8 experts with 8 slots
and of 32 with 2, and the dense model. Reported are the accuracy on test photographs and the CPU time of a training step
of both Soft MoEs, by turns. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if Soft MoE of 8 experts is ahead of top-1 in the mean, and a step with 32 experts takes less than 1.5 times
that with 8.

`--normalisation` compares Soft MoE of 8 experts with one whose logits are not normalised, at two rates, and keeps its
rows in claims/results/soft_moe_normalisation.csv.

    python claims/soft_moe.py     3 seeds, about 25 minutes on one core; rows in claims/results/soft_moe.csv
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean

import torch
from common.images import BATCH, PATCHES, Images, compared, step, vit
from common.small import parser
from common.statistics import interval, paired
from common.training import balanced
from common.turns import by_turns
from results import append
from torch import Tensor, nn

from moeify import Recipe, record, sparsify
from moeify.find import last_half
from moeify.routers import ExpertChoice, Router, Soft, TopK
from moeify.routers.base import project
from moeify.sparsify import fresh

ROUNDS = 7
RATES = (1e-3, 4e-3)
"""Of the comparison with logits that are not normalised."""


class Unnormalised(Soft):
    """Soft MoE whose logits are x · μ."""

    def logits(self, x: Tensor) -> Tensor:
        return project(x, self.queries)


def built(router: Callable[[int, int], Router], num_experts: int) -> nn.Module:
    recipe = Recipe(where=last_half, num_experts=num_experts, router=router, experts=fresh)
    return sparsify(vit(), recipe, verbose=False)


def soft(num_experts: int, router: type[Soft] = Soft) -> nn.Module:
    return built(partial(router, slots=PATCHES // num_experts), num_experts)


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
    return by_turns({arm: lambda model=model: step(model, images).backward() for arm, model in models.items()}, ROUNDS)


@torch.no_grad()
def fullest(arm: str, model: nn.Module, unseen: Images) -> Mapping[str, str]:
    """The largest weight that a patch has in a slot, mean of slots, sparse layers and images."""
    with record(model) as decisions:
        model(pixel_values=unseen.pixels[:: len(unseen) // 256][:256])
    return {"fullest": f"{fmean(mixture.into.amax(-2).mean().item() for mixture in decisions.values()):.4f}"}


def without_normalisation(chosen: argparse.Namespace) -> None:
    arms = {"normalised": lambda: soft(8), "not normalised": lambda: soft(8, Unnormalised)}
    ends, kept = [], []
    for rate in RATES:
        at = argparse.Namespace(**vars(chosen) | {"rate": rate})
        found, rows = compared("soft_moe_normalisation", arms, at, balancing={}, measure=fullest)
        kept += rows
        ends.append(interval(found["normalised"], found["not normalised"]))
        print(f"at {rate:g} normalised less not", paired(found["normalised"], found["not normalised"]))
        every = min(a - b for a, b in zip(found["normalised"], found["not normalised"], strict=True)) > 0
    (_, before, _), (low, after, _) = ends
    result = "reproduced" if low > 0 and after > before else "in part" if every else "failed"
    print(result)
    for row in kept:
        append("soft_moe_normalisation", row | {"result": result})


def main() -> None:
    asked = parser(__doc__, steps=None)
    asked.add_argument("--normalisation", action="store_true", help="compare with logits that are not normalised")
    chosen = asked.parse_args()
    chosen.steps = chosen.steps or (400 if chosen.normalisation else 600)
    torch.set_num_threads(1)
    if chosen.normalisation:
        without_normalisation(chosen)
    else:
        against_routing(chosen)


def against_routing(chosen: argparse.Namespace) -> None:
    taken = seconds(tuple(ARMS))
    found, rows = compared("soft_moe", ARMS, chosen, balancing={"top-1": balanced})
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
