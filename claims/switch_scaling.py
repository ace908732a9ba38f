"""Switch (arXiv 2101.03961, figure 4): at equal FLOPs per token, more experts lower the loss at every doubling.

A small byte-level Llama, dense and with top-1 of 2 to 32 experts of the dense width, on the text that came with Python
and torch, at equal tokens. Reported are the held-out loss, the steps until it is what the dense model of the seed ends
with, by a line through the losses of every 25th step, and the CPU time of a step, the arms by turns. Design, prediction
and thresholds are in claims/designs.md, written before the first run.

Reproduced if the mean loss falls at every doubling from 2 to 32 experts (0.005 of noise allowed) and the best is 0.03
nats per byte ahead of dense. Predicted: not reproduced, as 32 experts see too few bytes each.

    python claims/switch_scaling.py     3 seeds, about 5 minutes on one core; rows in claims/results/switch_scaling.csv
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean

import torch
from common.small import BATCH, Data, llama, options, text, trained
from common.statistics import paired
from common.training import held_out, train
from common.turns import by_turns
from results import append
from torch import Tensor, nn

from moeify import Recipe, sparsify
from moeify.routers import TopK
from moeify.sparsify import fresh

EXPERTS = (1, 2, 4, 8, 16, 32)
"""1 is the dense model."""
EVERY, TURN, ROUNDS = 25, 5, 12


def built(num_experts: int) -> nn.Module:
    if num_experts == 1:
        return llama()
    router = partial(TopK, k=1, normalize=False)
    return sparsify(llama(), Recipe(num_experts=num_experts, router=router, experts=fresh), verbose=False)


class Course:
    """The held-out loss of a training before it starts, and after every 25 steps.

    Args:
        unseen: held-out blocks.
    """

    def __init__(self, unseen: Tensor) -> None:
        self.unseen, self.losses = unseen, list[float]()

    def __call__(self, model: nn.Module, step: int) -> None:
        if step == 0:
            self.losses = []
        if step % EVERY == 0:
            self.losses.append(held_out(model, self.unseen))
            model.train()

    def told(self, model: nn.Module, unseen: Tensor) -> Mapping[str, str]:
        """All of them, for a row."""
        return {"losses": " ".join(f"{loss:.4f}" for loss in (*self.losses, held_out(model, unseen)))}


def steps_to(loss: float, losses: Sequence[float], steps: int) -> float | None:
    """Where the line through the losses of a training first falls to one; None if it never does."""
    places = [*range(0, steps, EVERY), steps]
    for (begin, before), (end, after) in pairwise(zip(places, losses, strict=False)):
        if after <= loss:
            return begin + (end - begin) * max(0.0, (before - loss) / (before - after))
    return None


def seconds(data: Data) -> dict[int, float]:
    """CPU time of a step of training of every arm, of turns of some steps."""
    torch.manual_seed(0)
    batch = data.learnt[:BATCH]
    models = {experts: built(experts) for experts in EXPERTS}
    turns = {experts: partial(train, model, lambda dice: batch, TURN, 0, 1e-3) for experts, model in models.items()}
    return {experts: taken / TURN for experts, taken in by_turns(turns, ROUNDS).items()}


def main() -> None:
    chosen, data = options(__doc__), text()
    torch.set_num_threads(1)
    course = Course(data.unseen)
    arms = {experts: partial(built, experts) for experts in EXPERTS}
    ends, rows = trained("switch_scaling", "experts", arms, chosen, prepare=course, measure=course.told, data=data)
    taken = seconds(data)
    dense = {row["seed"]: float(row["loss"]) for row in rows if row["experts"] == 1}
    for row in rows:
        reached = steps_to(dense[row["seed"]], [float(loss) for loss in row["losses"].split()], chosen.steps)
        row["steps_to_dense"] = "" if reached is None else f"{reached:.1f}"
        row["step_cpu_ms"] = f"{1000 * taken[row['experts']]:.2f}"
    means = [fmean(ends[experts]) for experts in EXPERTS]
    falls = all(after <= before + 0.005 for before, after in pairwise(means[1:]))
    result = "reproduced" if falls and means[0] - min(means[1:]) >= 0.03 else "failed"
    for experts in EXPERTS[1:]:
        reached = [row["steps_to_dense"] or "never" for row in rows if row["experts"] == experts]
        print(f"E={experts}: {fmean(ends[experts]):.4f}, less dense {paired(ends[experts], ends[1])};", end=" ")
        print(f"the dense loss after {', '.join(reached)} steps of {taken[experts] / taken[1]:.2f} times the CPU time")
    print(result)
    for row in rows:
        append("switch_scaling", row | {"result": result})


if __name__ == "__main__":
    main()
