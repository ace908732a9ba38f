"""Over-sparsity: at equal active FLOPs and equal tokens, more experts help up to a point, and then no more.

The scaling laws of arXiv 2202.01169 and 2501.12370 find that what another expert brings shrinks, and that for a given
budget of training there is a sparsity beyond which loss does not fall. Here k and E are swept over small models of
bytes: k experts of 1 / k of the dense hidden width run per token, so that every model does the dense model's work,
beside the router. An expert sees k / E of the tokens.

Predicted before the first run, for 0.5 M tokens: (1) the best sparse model is at least 0.02 nats per byte ahead of the
dense one; (2) with k = 1 the loss at E = 64 is not lower than at E = 16 by more than 0.01, a U or a flat bottom;
(3) at E = 64, k = 4 of a quarter of the width is ahead of k = 1. "reproduced" asks for (1) and (2).

    python claims/over_sparsity.py      3 seeds, about 10 minutes on one core; rows in claims/results/over_sparsity.csv
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import fmean, stdev

import torch
import transformers
from common.rates import UNREPORTED, add_rates, parted, rates_of
from common.text import text_by_domain
from results import append
from torch import Tensor, nn

from moeify import Recipe, losses, record, sparsify
from moeify.data.blocks import Blocks
from moeify.flops import count
from moeify.layers import moe_layers
from moeify.routers import TopK, sigmoid
from moeify.sparsify import fresh

LENGTH, BATCH, HIDDEN = 128, 16, 256
DOMAINS = ("novel", "code_python", "drama")
ARMS = [(1, 1), (1, 4), (1, 16), (1, 64), (2, 8), (2, 32), (4, 16), (4, 64)]
"""k and E; E = 1 is the dense model."""


def dense() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def built(k: int, num_experts: int) -> nn.Module:
    """A sigmoid starts at 1/2, so that with twice the weights k experts of 1 / k of the width start as loud as one."""
    model = dense()
    if num_experts == 1:
        return model
    router = partial(TopK, k=k, score=sigmoid, normalize=False, scale=2.0)
    return sparsify(
        model, Recipe(num_experts=num_experts, router=router, experts=partial(fresh, granularity=k)), verbose=False
    )


def batch_of(blocks: Blocks, chosen: Tensor) -> Tensor:
    return blocks.input_ids[chosen].long()


@torch.no_grad()
def held_out(model: nn.Module, blocks: Blocks, chosen: Tensor) -> float:
    """Nats per byte of the chosen blocks."""
    model.eval()
    batches = (batch_of(blocks, some) for some in chosen.split(BATCH))
    mean = fmean(model(input_ids=ids, labels=ids).loss.item() for ids in batches)
    model.train()
    return mean


def loss_of(model: nn.Module, ids: Tensor, balance: float) -> Tensor:
    if not moe_layers(model):
        return model(input_ids=ids, labels=ids).loss
    with record(model) as decisions:
        task = model(input_ids=ids, labels=ids).loss
    return task + balance * torch.stack([losses.balance(routing) for routing in decisions.values()]).mean()


def trained(model: nn.Module, blocks: Blocks, steps: int, seed: int, rate: float) -> nn.Module:
    """AdamW with a warm-up of 20 steps and a linear fall; the order of the data depends on the seed only."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, 1 - s / steps))
    for step in range(steps):
        chosen = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        loss_of(model, batch_of(blocks, chosen), 0.01).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    add_rates(parser, 3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, validation = text_by_domain(DOMAINS, 1_500_000, LENGTH)
    unreported, reported = parted(len(validation), parts=2)

    def run(arm: tuple[int, int], seed: int, rate: float) -> nn.Module:
        torch.manual_seed(seed)
        return trained(built(*arm).train(), train, options.steps, seed, rate)

    def error(arm: tuple[int, int], rate: float) -> float:
        return held_out(run(arm, UNREPORTED, rate), validation, unreported)

    rates = rates_of("over_sparsity", ARMS, options, error)
    ends: dict[tuple[int, int], list[float]] = {arm: [] for arm in ARMS}
    rows = []
    for seed in options.seeds:
        for k, num_experts in ARMS:
            began = time.perf_counter()
            model = run((k, num_experts), seed, rates[k, num_experts])
            counted = count(model)
            ends[k, num_experts].append(held_out(model, validation, reported))
            rows.append({
                "hardware": options.hardware, "k": k, "experts": num_experts, "seed": seed, "steps": options.steps,
                "tokens": options.steps * BATCH * LENGTH, "validation_loss": f"{ends[k, num_experts][-1]:.4f}",
                "parameters": counted.parameters, "active_parameters": counted.active_parameters,
                "flops": counted.flops, "seconds": f"{time.perf_counter() - began:.0f}",
                "rate": rates[k, num_experts],
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    mean = {arm: fmean(values) for arm, values in ends.items()}
    for (k, num_experts), values in ends.items():
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        print(f"k={k} E={num_experts}: {fmean(values):.4f}{spread}, against dense {fmean(values) - mean[1, 1]:+.4f}")
    gain, tail = mean[1, 1] - min(mean.values()), mean[1, 16] - mean[1, 64]
    result = "reproduced" if gain >= 0.02 and tail <= 0.01 else "failed"
    print(f"best sparse ahead of dense by {gain:.4f}; E 16 -> 64 at k=1 brings {tail:+.4f}: {result}")
    for row in rows:
        append("over_sparsity", row | {"result": result})


if __name__ == "__main__":
    main()
