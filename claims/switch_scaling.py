"""Switch (arXiv 2101.03961, figure 4): at equal FLOPs per token, more experts lower the loss at every doubling.

A small byte-level Llama, dense and with top-1 of 2 to 32 experts of the dense width, on the text that came with Python
and torch, at equal tokens. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if the mean loss falls at every doubling from 2 to 32 experts (0.005 of noise allowed) and the best is 0.03
nats per byte ahead of dense. Predicted: not reproduced, as 32 experts see too few bytes each.

    python claims/switch_scaling.py     3 seeds, about 6 minutes on one core; rows in claims/results/switch_scaling.csv
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from statistics import fmean

from common.small import llama, options, trained
from common.statistics import paired
from results import append
from torch import nn

from moeify import Recipe, sparsify
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
    ends, rows = trained("experts", {experts: partial(built, experts) for experts in EXPERTS}, options(__doc__))
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
