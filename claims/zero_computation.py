"""MoE++ (arXiv 2410.07348): beside experts that compute nothing, fewer of the others run, at no price in loss.

A small byte-level Llama with the recipe `moepp`: top-2 of 8 feed-forward experts, a zero, a copy and two constant ones,
with the balance loss of the paper (weight 0.75 at experts without computation), against the same routers with the
8 alone, and plain top-2 of 8. Reported are the loss, the calls of feed-forward experts per token and layer, of 2, and
their correlation over held-out tokens with the loss of what is predicted there. Design, prediction and thresholds are
in claims/designs.md, written before the first run.

Reproduced if the calls are fewer by 10 % or more, and the mean loss is less than 0.02 nats per byte above that of the
8 alone.

    python claims/zero_computation.py     3 seeds, about 6 minutes on one core; rows in claims/results
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean

import torch
from common.small import llama, options, trained
from common.statistics import paired
from common.training import BALANCE
from results import append
from torch import Tensor, nn

from moeify import Recipe, losses, record, sparsify
from moeify.routers import Residual, TopK
from moeify.routing import Routing
from moeify.sparsify import fresh, recipes, with_free

FFNS = 8
COSTS = torch.tensor([1.0] * FFNS + [0.75] * 4)
ALONE = Recipe(
    num_experts=FFNS,
    router=partial(Residual, k=2, hidden=8 * FFNS),
    experts=partial(with_free, zero=0, copy=0, constant=0, scale=2.0),
)
RECIPES = {
    "MoE++": recipes["moepp"],
    "8 alone": ALONE,
    "8 alone, plain top-2": Recipe(num_experts=FFNS, router=partial(TopK, k=2), experts=fresh),
}


def built(recipe: Recipe) -> nn.Module:
    return sparsify(llama(), recipe, verbose=False)


def weighted(routing: Routing) -> Tensor:
    return BALANCE * losses.cost(routing, COSTS)


@torch.no_grad()
def calls(model: nn.Module, ids: Tensor) -> Mapping[str, str]:
    """Calls of feed-forward experts per token and layer, and their correlation with the loss at a token."""
    called, missed = [], []
    for part in ids.split(32):
        with record(model.eval()) as decisions:
            logits = model(input_ids=part).logits[:, :-1]
        rows = torch.zeros(part.numel())
        for routing in decisions.values():
            runs = routing.source[routing.expert < FFNS]
            rows.index_add_(0, runs, torch.ones(len(runs)))
        called.append((rows / len(decisions)).view(part.shape)[:, :-1].flatten())
        missed.append(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    per_token, missing = torch.cat(called), torch.cat(missed)
    together = "" if per_token.var() == 0 else f"{torch.corrcoef(torch.stack([per_token, missing]))[0, 1]:.4f}"
    return {"calls": f"{per_token.mean():.4f}", "correlation": together}


def main() -> None:
    arms = {arm: partial(built, recipe) for arm, recipe in RECIPES.items()}
    ends, rows = trained(
        "zero_computation", "arm", arms, options(__doc__), balancing={"MoE++": weighted}, measure=calls
    )
    for arm, loss in ends.items():
        print(f"{arm}: {fmean(loss):.4f}, less the 8 alone {paired(loss, ends['8 alone'])}")
    called = fmean(float(row["calls"]) for row in rows if row["arm"] == "MoE++")
    costs = fmean(ends["MoE++"]) - fmean(ends["8 alone"])
    result = "reproduced" if called <= 1.8 and costs < 0.02 else "failed"
    print(f"{100 * (called / 2 - 1):.0f} % calls,", result)
    for row in rows:
        append("zero_computation", row | {"result": result})


if __name__ == "__main__":
    main()
