"""LIMoE (arXiv 2206.02770): in one tower for pictures and captions, entropies keep captions from losing the experts.

Pictures and English names of emoji-captions, in one small encoder with the recipe `limoe` (top-1 of 8 experts in every
other layer, with a capacity): a balance loss alone, and the paper's entropies, the local one of captions and the global
ones of both modalities, instead. Reported are the share of the tokens of each modality that no expert takes on the 190
test pairs, how many experts each uses, and recall at 5. Design, prediction and thresholds are in claims/designs.md,
written before the first run.

Reproduced if, with the entropies, the share of caption tokens dropped over that of patches is lower in every seed.

    python claims/limoe.py     3 seeds, about 6 minutes on one core; rows in claims/results/limoe.csv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import torch
from common.rates import UNREPORTED, add_rates, parted, rates_of
from common.statistics import paired
from common.training import BALANCE
from results import append
from torch import Tensor, nn
from torch.utils.data import Subset

from moeify import losses, record, sparsify
from moeify.data.claim_files import data_file
from moeify.models.one_tower import CAPTION, PICTURE
from moeify.routing import Routing
from moeify.sparsify import recipes
from moeify.tasks.base import Setup, Shape
from moeify.tasks.contrastive import Contrastive, masked, recall
from moeify.tasks.modalities import entropies

BATCH, WEIGHT = 64, 0.04
EXPERTS = recipes["limoe"].num_experts
OF = {"patches": PICTURE, "captions": CAPTION}


def balance(routing: Routing) -> Tensor:
    return BALANCE * losses.balance(routing)


def entropy(routing: Routing) -> Tensor:
    return torch.stack([weight * loss(routing) for weight, loss in entropies(WEIGHT, EXPERTS)]).sum()


ARMS: dict[str, Callable[[Routing], Tensor]] = {"balance loss": balance, "entropies": entropy}


def pairs() -> Setup:
    """Both parts of emoji-captions, and how a model of them is built."""
    train, test = (str(data_file(f"emoji-captions/{part}.parquet")) for part in ("train", "test"))
    shape = Shape(width=64, layers=4, heads=4, hidden=128)
    return Contrastive(caption="name_en", validation=test, towers=1, shape=shape, size=32, patch=4).prepare(None, train)


def trained(setup: Setup, loss_of: Callable[[Routing], Tensor], steps: int, seed: int, rate: float) -> nn.Module:
    torch.manual_seed(seed)
    model = sparsify(setup.build(), recipes["limoe"], probe=setup.probe, verbose=False).train()
    dice = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, anneal_strategy="linear")
    for _ in range(steps):
        chosen = torch.randperm(len(setup.train), generator=dice)[:BATCH].tolist()
        with record(model) as decisions:
            loss = model(**setup.objective.collate([setup.train[i] for i in chosen])).loss
        (loss + torch.stack([loss_of(routing) for routing in decisions.values()]).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, setup: Setup) -> dict[str, float]:
    """Shares of dropped tokens and experts in use by modality, means of the layers; recall at 5, mean of both ways."""
    batch = setup.objective.collate([setup.validation[i] for i in range(len(setup.validation))])
    with record(model) as decisions:
        found = model(**batch)
    dropped: dict[str, list[float]] = {name: [] for name in OF}
    used: dict[str, list[float]] = {name: [] for name in OF}
    for routing in decisions.values():
        for name, label in OF.items():
            of = routing.evidence.label == label
            load = routing.choices.indices[of].flatten().bincount(minlength=EXPERTS).double()
            used[name].append(torch.distributions.Categorical(load).entropy().exp().item())
            taken = (routing.source < routing.shape[1] * routing.shape[0] // 2) == (label == PICTURE)
            dropped[name].append(100 * (1 - taken.sum().item() / int(of.sum())))
    at_5 = recall(found.image_embeds @ found.text_embeds.mT, [tuple(ids) for ids in masked(batch)])
    means = {f"dropped_{name}": fmean(values) for name, values in dropped.items()}
    means |= {f"experts_{name}": fmean(values) for name, values in used.items()}
    return means | {"recall_at_5": 100 * fmean(at_5[f"{name} recall@5"] for name in ("caption", "picture"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    add_rates(parser, 1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setup = pairs()
    rest, most = (Subset(setup.train, at.tolist()) for at in parted(len(setup.train)))
    tuning = replace(setup, train=most, validation=rest)

    def error(arm: str, rate: float) -> float:
        model = trained(tuning, ARMS[arm], options.steps, UNREPORTED, rate)
        return 100 - measured(model, tuning)["recall_at_5"]

    rates = rates_of("limoe", ARMS, options, error)
    ends: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    rows = []
    for seed in options.seeds:
        for arm, loss_of in ARMS.items():
            began = time.process_time()
            ends[arm].append(measured(trained(setup, loss_of, options.steps, seed, rates[arm]), setup))
            rows.append({
                "hardware": options.hardware, "arm": arm, "seed": seed, "steps": options.steps,
                "pairs": options.steps * BATCH, "rate": rates[arm],
                **{name: f"{value:.2f}" for name, value in ends[arm][-1].items()},
                "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    ratios = {arm: [end["dropped_captions"] / max(end["dropped_patches"], 0.1) for end in ends[arm]] for arm in ARMS}
    for arm, found in ends.items():
        told = ", ".join(f"{name} {fmean(end[name] for end in found):.1f}" for name in found[0])
        print(f"{arm}: {told}; captions over patches {fmean(ratios[arm]):.2f}")
    fewer = paired(ratios["entropies"], ratios["balance loss"])
    lower = all(a < b for a, b in zip(ratios["entropies"], ratios["balance loss"], strict=True))
    result = "reproduced" if lower else "failed"
    print("ratio with entropies less without:", fewer, result)
    for row in rows:
        append("limoe", row | {"result": result})


if __name__ == "__main__":
    main()
