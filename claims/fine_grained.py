"""DeepSeekMoE (arXiv 2401.06066, section 4.4): more, finer experts at equal parameters and FLOPs lower the loss.

A small byte-level Llama with 8 experts of width 128, of which 2 run, 16 of 64 (4 run), 32 of 32 (8 run), and the last
with one of its running experts shared by all tokens, on the text that came with Python and torch. Weights are doubled
sigmoids, with which the experts together start as loud in every arm. Design, prediction and thresholds are in
claims/designs.md, written before the first run.

Reproduced if the mean loss of 32 is below that of 8, and falls from 8 to 16 to 32 (0.005 of noise allowed).

    python claims/fine_grained.py     3 seeds, about 5 minutes on one core; rows in claims/results/fine_grained.csv
"""

from __future__ import annotations

from functools import partial
from statistics import fmean

from common.small import llama, options, trained
from common.statistics import paired
from results import append
from torch import nn

from moeify import Recipe, sparsify
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
    arms = {arm: partial(built, *settings) for arm, settings in ARMS.items()}
    ends, rows = trained("fine_grained", "arm", arms, options(__doc__))
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
