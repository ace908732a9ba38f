"""HMoE (arXiv 2408.10681): among experts of unequal widths, a loss on their cost moves tokens to the small ones.

A small byte-level Llama with 8 experts of widths 32 to 224 and top-p of 0.6, with the balance loss and with the paper's
penalty, which weights it by the parameters of an expert, against 8 experts of the mean width, 128, with the balance
loss. Reported are the loss and the parameters of experts that run per token and layer, untrained and trained. Design,
prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if, with the penalty, the mean of the parameters that run falls in training.

    python claims/heterogeneous.py     3 seeds, about 8 minutes on one core; rows in claims/results/heterogeneous.csv
"""

from __future__ import annotations

from functools import partial
from statistics import fmean

import torch
from common.small import WIDTH, llama, options, text, trained
from common.statistics import paired
from common.training import BALANCE
from results import append
from torch import Tensor, nn

from moeify import Recipe, losses, record, sparsify
from moeify.experts import Blocks, Experts
from moeify.routers import TopP
from moeify.routing import Routing
from moeify.sparsify import fresh

WIDTHS = (32, 60, 88, 112, 144, 168, 196, 224)
EQUAL = (128,) * 8
COSTS = torch.tensor(WIDTHS, dtype=torch.float32)
MATRICES = 3
"""Gate, up and down projection of an expert, each of 64 by its width."""
ARMS = {"equal widths": EQUAL, "unequal widths": WIDTHS, "unequal widths, penalty": WIDTHS}


def experts(dense: nn.Module, num_experts: int, *, widths: tuple[int, ...]) -> Experts:
    """One expert of each width."""
    return Blocks(fresh(dense, 1, hidden=width) for width in widths)


def built(widths: tuple[int, ...]) -> nn.Module:
    recipe = Recipe(num_experts=8, router=partial(TopP, p=0.6), experts=partial(experts, widths=widths))
    return sparsify(llama(), recipe, verbose=False)


def penalty(routing: Routing) -> Tensor:
    return BALANCE * losses.cost(routing, COSTS)


@torch.no_grad()
def running(model: nn.Module, ids: Tensor, widths: tuple[int, ...]) -> float:
    """Parameters of experts that run per token, the mean of the layers."""
    with record(model.eval()) as decisions:
        model(input_ids=ids[:32])
    work = [(routing.counts * torch.tensor(widths)).sum().item() for routing in decisions.values()]
    return MATRICES * WIDTH * fmean(work) / ids[:32].numel()


def main() -> None:
    chosen, data = options(__doc__), text()
    ends, rows = trained(
        "heterogeneous", "arm", {arm: partial(built, widths) for arm, widths in ARMS.items()}, chosen, data=data,
        balancing={"unequal widths, penalty": penalty},
        measure=lambda model, ids: {"running": f"{running(model, ids, widths_of(model)):.0f}"},
    )  # fmt: skip
    for row in rows:
        torch.manual_seed(row["seed"])
        row["running_untrained"] = f"{running(built(ARMS[row['arm']]), data.unseen, ARMS[row['arm']]):.0f}"
    change = {}
    for arm, loss in ends.items():
        of_arm = [row for row in rows if row["arm"] == arm]
        after, before = ([float(row[column]) for row in of_arm] for column in ("running", "running_untrained"))
        change[arm] = fmean(after) / fmean(before) - 1
        print(f"{arm}: {fmean(loss):.4f}, less equal widths {paired(loss, ends['equal widths'])}")
        print(
            f"  {fmean(before):.0f} parameters run before training, {fmean(after):.0f} after: {100 * change[arm]:.0f} %"
        )
    result = "reproduced" if change["unequal widths, penalty"] < 0 else "failed"
    print(result)
    for row in rows:
        append("heterogeneous", row | {"result": result})


def widths_of(model: nn.Module) -> tuple[int, ...]:
    """The widths of the experts of the first layer."""
    groups = model.get_submodule("model.layers.0.mlp.experts.banks").children()
    return tuple(group.down[0].shape[-1] for group in groups)


if __name__ == "__main__":
    main()
