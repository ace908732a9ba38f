"""Sparse upcycling (arXiv 2212.05055, section 4): after the same further tokens, the upcycled model beats the dense.

Somebody else's dense model, stories260K, is made sparse by copying (4 experts, top-2, renormalised weights), which
leaves its outputs as they are; then both go on learning from the same novels. Two controls: one copy, which is the
dense model in another form and must end where it ends, and a sparse model whose experts start fresh.

    python claims/upcycling.py          3 seeds, about 10 minutes on one core; appends to claims/results/upcycling.csv
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from functools import partial
from statistics import fmean, stdev

import torch
import transformers
from common.rates import UNREPORTED, add_rates, parted, rates_of
from results import append
from torch import Tensor, nn

from moeify import Recipe, losses, record, sparsify
from moeify.data.claim_files import data_file
from moeify.origin import Origin
from moeify.routers import TopK
from moeify.sparsify import fresh

LENGTH, BATCH = 256, 8
ARMS: dict[str, Recipe | None] = {
    "dense": None,
    "copies": Recipe(num_experts=4, router=partial(TopK, k=2)),
    "one copy": Recipe(num_experts=1, router=partial(TopK, k=1)),
    "fresh experts": Recipe(num_experts=4, router=partial(TopK, k=2), experts=fresh),
}


def stories() -> transformers.PreTrainedModel:
    folder = data_file("stories260k/hf/model.safetensors").parent
    data_file("stories260k/hf/config.json")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def novels(part: str) -> Tensor:
    """Blocks of tokens of the domain `novel`, (blocks, LENGTH)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_file("stories260k/hf/tokenizer.json").parent)
    with gzip.open(data_file(f"text-domains/{part}.jsonl.gz"), "rt") as lines:
        texts = [row["text"] for row in map(json.loads, lines) if row["domain"] == "novel"]
    ids = torch.tensor([i for text in texts for i in tokenizer.encode(text)])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@torch.no_grad()
def held_out(model: nn.Module, blocks: Tensor) -> float:
    model.eval()
    mean = fmean(model(input_ids=b, labels=b).loss.item() for b in blocks.split(BATCH))
    model.train()
    return mean


def go_on(model: nn.Module, blocks: Tensor, steps: int, seed: int, rate: float, balance: float) -> None:
    """AdamW at a constant rate with a short warm-up, on blocks in an order that the seed decides."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    run: Callable = partial(_loss, balance=balance) if Origin.of(model).recipe else _dense_loss
    for step in range(steps):
        chosen = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        run(model, blocks[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        optimizer.zero_grad()


def _dense_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def _loss(model: nn.Module, ids: Tensor, balance: float) -> Tensor:
    with record(model) as decisions:
        task = model(input_ids=ids, labels=ids).loss
    return task + balance * torch.stack([losses.balance(routing) for routing in decisions.values()]).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    add_rates(parser, 5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, validation = novels("train"), novels("validation")
    before = held_out(stories(), validation)
    print(f"{len(train)} blocks, before: {before:.4f} nats per token")

    def built(arm: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model, recipe = stories(), ARMS[arm]
        return model if recipe is None else sparsify(model, recipe, verbose=False)

    rest, most = (train[at] for at in parted(len(train)))

    def error(arm: str, rate: float) -> float:
        model = built(arm, UNREPORTED)
        go_on(model.train(), most, options.steps, UNREPORTED, rate, balance=0.01)
        return held_out(model, rest)

    rates = rates_of("upcycling", ARMS, options, error)
    ends: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm, rate in rates.items():
            model = built(arm, seed)
            start = held_out(model, validation)
            go_on(model.train(), train, options.steps, seed, rate, balance=0.01)
            end = held_out(model, validation)
            ends[arm].append(end)
            append("upcycling", {
                "arm": arm, "seed": seed, "steps": options.steps, "tokens": options.steps * BATCH * LENGTH,
                "loss_before": f"{before:.4f}", "loss_at_start": f"{start:.4f}", "loss_at_end": f"{end:.4f}",
                "hardware": options.hardware, "rate": rate,
            })  # fmt: skip
            print(f"seed {seed}  {arm}: {start:.4f} -> {end:.4f}", flush=True)
    for arm, values in ends.items():
        gains = [value - dense for value, dense in zip(values, ends["dense"], strict=True)]
        spread = f" ± {stdev(gains):.4f}" if len(gains) > 1 else ""
        print(f"{arm}: {fmean(values):.4f}, against dense {fmean(gains):+.4f}{spread}")


if __name__ == "__main__":
    main()
