"""CompeteSMoE, X-MoE, SMoE-Dropout and MH-MoE: each says that it keeps experts from collapsing, and beats plain top-2.

arXiv 2505.13380, 2204.09179, 2303.01610 and 2411.16205. A small byte-level Llama with top-2 of 16 experts, and each of
these in its place, at equal total training FLOPs: a competition is charged with all experts, SMoE-Dropout with the k
of every step, which grows from 2 to 16, and MH-MoE has the sizes of its second paper, with 4 heads. Reported are the
loss (SMoE-Dropout's with all 16 experts, as its paper has it, and for every k), and the share of tokens whose first
choice on held-out text changes in the last fifth of training. Design, prediction and thresholds are in
claims/designs.md, written before the first run.

Reproduced, for each, if its loss is below that of top-2 beyond the 95 % interval of the differences paired by seed.

    python claims/collapse.py     3 seeds, about 15 minutes on one core; rows in claims/results/collapse.csv
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from common.rates import UNREPORTED, rates_of
from common.small import BATCH, HIDDEN, LENGTH, WIDTH, llama, options, text
from common.statistics import interval, paired
from common.training import Balancing, balanced, drawn, held_out, train
from results import append
from torch import Tensor, nn

from moeify import Recipe, record, sparsify
from moeify.find import ffn, sub_tokens
from moeify.flops import Count, count
from moeify.losses import distillation, diversity
from moeify.multihead import matched
from moeify.routers import Compete, Cosine, Frozen, Router, TopK, begin_step
from moeify.routing import Routing
from moeify.schedule import linear
from moeify.sparsify import fresh

EXPERTS, K, HEADS = 16, 2, 4
KS = (1, 2, 4, 8, 16)
SUB_EXPERTS, SUB_HIDDEN = matched(WIDTH, EXPERTS, HIDDEN, heads=HEADS, k=K)


def with_competition(routing: Routing) -> Tensor:
    return balanced(routing) + 1e-3 * distillation(routing) + 5e-3 * diversity(routing)


def cost(counted: Count) -> float:
    return counted.flops


def cost_with_competitions(counted: Count, rate: float = 0.07) -> float:
    return (1 - rate) * counted.flops + rate * counted.dense_flops


def cost_of_growing(counted: Count) -> float:
    """The mean over k from K to E, of which the FLOPs are a straight line."""
    return (counted.flops + counted.dense_flops) / 2


@dataclass(frozen=True)
class Arm:
    """How a model is built, which loss its decisions have, and what a token costs in training."""

    recipe: Recipe
    balancing: Balancing = balanced
    cost: Callable[[Count], float] = cost

    def built(self) -> nn.Module:
        return sparsify(llama(), self.recipe, verbose=False)


def recipe(router: Callable[[int, int], Router]) -> Recipe:
    return Recipe(num_experts=EXPERTS, router=router, experts=fresh)


ARMS = {
    "top-2": Arm(recipe(partial(TopK, k=K))),
    "CompeteSMoE": Arm(recipe(partial(Compete, k=K)), with_competition, cost_with_competitions),
    "X-MoE": Arm(recipe(partial(Cosine, k=K, normalize=True))),
    "SMoE-Dropout": Arm(recipe(partial(Frozen, k=K)), cost=cost_of_growing),
    "MH-MoE": Arm(
        Recipe(
            where=sub_tokens(HEADS, where=ffn), num_experts=SUB_EXPERTS, router=partial(TopK, k=K),
            experts=partial(fresh, hidden=SUB_HIDDEN),
        )
    ),
}  # fmt: skip


@torch.no_grad()
def first_choices(model: nn.Module, ids: Tensor) -> Tensor:
    """The expert of the largest logit, of every decision of every layer."""
    with record(model.eval()) as decisions:
        model(input_ids=ids)
    return torch.stack([routing.logits.argmax(-1) for routing in decisions.values()])


def set_k(model: nn.Module, k: int) -> None:
    for part in model.modules():
        if isinstance(part, Frozen):
            part.k = k


class Course:
    """What happens before a step: competitions are drawn, k grows, and four fifths on first choices are kept."""

    def __init__(self, steps: int, seed: int, ids: Tensor) -> None:
        self.seed, self.ids = seed, ids
        self.grows = linear(K, EXPERTS, steps)
        self.noted = min(round(0.8 * steps), steps - 1)

    def __call__(self, model: nn.Module, step: int) -> None:
        begin_step(model, step, seed=self.seed)
        if step == self.noted:
            set_k(model, K)
            self.choices = first_choices(model, self.ids)
            model.train()
        set_k(model, round(self.grows(step)))


def main() -> None:
    chosen = options(__doc__)
    torch.set_num_threads(1)
    data = text()
    budget = chosen.steps * cost(count(ARMS["top-2"].built()))
    steps = {name: round(budget / arm.cost(count(arm.built()))) for name, arm in ARMS.items()}

    def run(name: str, seed: int, rate: float) -> tuple[nn.Module, Course]:
        torch.manual_seed(seed)
        model, course = ARMS[name].built(), Course(steps[name], seed, data.unseen[:32])
        batches, balancing = drawn(data.learnt, batch=BATCH), ARMS[name].balancing
        train(model, batches, steps[name], seed, rate, balancing=balancing, prepare=course)
        return model, course

    def error(name: str, rate: float) -> float:
        model, _ = run(name, UNREPORTED, rate)
        set_k(model, EXPERTS)
        return held_out(model, data.choosing)

    rates = rates_of("collapse", ARMS, chosen, error, corpus=data.corpus)
    ends: dict[str, list[float]] = {name: [] for name in ARMS}
    rows = []
    for seed in chosen.seeds:
        for name, rate in rates.items():
            began = time.process_time()
            model, course = run(name, seed, rate)
            counted = count(model)
            set_k(model, K)
            changed = (first_choices(model, course.ids) != course.choices).float().mean().item()
            set_k(model, EXPERTS)
            ends[name].append(held_out(model, data.unseen))
            by_k = {}
            for k in KS if name == "SMoE-Dropout" else ():
                set_k(model, k)
                by_k[k] = f"{held_out(model, data.unseen):.4f}"
            rows.append({
                "hardware": chosen.hardware, "arm": name, "seed": seed, "steps": steps[name],
                "tokens": steps[name] * BATCH * LENGTH, "rate": rate, "loss": f"{ends[name][-1]:.4f}",
                "changed": f"{100 * changed:.2f}", **{f"loss_k_{k}": by_k.get(k, "") for k in KS},
                "parameters": counted.parameters, "flops": counted.flops,
                "cpu_seconds": f"{time.process_time() - began:.0f}", "corpus": data.corpus,
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    results = {"top-2": "run"}
    for name, losses in ends.items():
        if name != "top-2":
            results[name] = "reproduced" if interval(losses, ends["top-2"])[2] < 0 else "failed"
        changed = fmean(float(row["changed"]) for row in rows if row["arm"] == name)
        print(
            f"{name}: {fmean(losses):.4f}, less top-2 {paired(losses, ends['top-2'])}; {changed:.1f} % change", end=" "
        )
        print(results[name])
    for row in rows:
        append("collapse", row | {"result": results[row["arm"]]})


if __name__ == "__main__":
    main()
