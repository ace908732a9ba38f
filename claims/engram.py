"""Engram (arXiv 2601.07372, section 3): at equal size and cost, n-grams in place of some experts lower the loss.

A small byte-level Llama, whose sparse layers have experts of width 64, top-2, and tables of 2- and 3-grams beside them,
from experts alone to tables alone, on the text that came with Python and torch. Experts without tables are wider by as
many FLOPs as the memory's projections cost. Design, prediction and thresholds are in claims/designs.md, written before
the first run.

Reproduced if the arm of the lowest mean loss lies between experts alone and tables alone, ahead of both in every seed,
by 0.005 nats per byte or more in the mean: the U of the paper's figure 3.

    python claims/engram.py     3 seeds, about 11 minutes on one core; rows in claims/results/engram.csv
"""

from __future__ import annotations

from functools import cache, partial
from statistics import fmean

from common.small import WIDTH, llama, options, trained
from common.statistics import paired
from results import append
from torch import nn

from moeify import Recipe, sparsify
from moeify.flops import count
from moeify.sparsify import engram, fresh

ALONE, WIDER, HIDDEN = 24, 74, 64
"""Experts without a memory, their width, and that of experts beside one."""
EXPERTS = (22, 16, 10, 4, 2)
"""Of the arms with a memory; with two of them, both run for every token, and all that is sparse are tables."""
LAYERS, HEADS, DIMENSIONS, TABLES = 2, 4, 16, 8


def share(experts: int) -> float:
    """The share of idle sparse parameters that experts have; the rest are rows of tables."""
    if experts == ALONE:
        return 1.0
    idle, tables = (experts - 2) * 3 * WIDTH * HIDDEN, rows_for(experts) * TABLES * DIMENSIONS // HEADS
    return idle / (idle + tables)


def built(experts: int) -> nn.Module:
    if experts == ALONE:
        alone = Recipe(num_experts=ALONE, experts=partial(fresh, hidden=WIDER))
        return sparsify(llama(), alone, verbose=False)
    return beside_memory(experts, rows_for(experts))


def beside_memory(experts: int, rows: int) -> nn.Module:
    memory = partial(engram, rows=rows, dimensions=DIMENSIONS, heads=HEADS)
    recipe = Recipe(num_experts=experts, experts=partial(fresh, hidden=HIDDEN), memory=memory)
    return sparsify(llama(), recipe, verbose=False)


@cache
def rows_for(experts: int) -> int:
    """Rows of each table at least, for as many parameters as experts alone have."""
    left = count(built(ALONE)).parameters - count(beside_memory(experts, 2)).parameters
    return left // (LAYERS * TABLES * DIMENSIONS // HEADS)


def main() -> None:
    arms = {f"{share(experts):.2f}": partial(built, experts) for experts in (ALONE, *EXPERTS)}
    ends, rows = trained("engram", "share", arms, options(__doc__))
    alone, *between, tables = ends.values()
    for arm, losses in ends.items():
        print(f"{arm}: {fmean(losses):.4f}, less experts {paired(losses, alone)}, less tables {paired(losses, tables)}")
    best = min(between, key=fmean)
    ahead = all(
        all(a < b for a, b in zip(best, end, strict=True)) and fmean(end) - fmean(best) >= 0.005
        for end in (alone, tables)
    )
    result = "reproduced" if ahead else "failed"
    print(result)
    for row in rows:
        append("engram", row | {"result": result})


if __name__ == "__main__":
    main()
