"""Mixtral (arXiv 2401.04088): nearly as good as the dense model of its total size, at the speed of a smaller one.

A small byte-level Llama with top-2 of 8 experts, against dense models with its active and with its total parameters, on
three domains of text-domains. Reported are the held-out loss and the tokens per second of CPU time that each model
decodes, the arms by turns; also of models of width 512 that are not trained, whose work is more than its overhead, and
for 64 sequences at once. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if the sparse model is ahead of the dense one of its active size in every seed, and decodes one sequence 1.5
times as fast as the dense one of its total size (at width 64, the median over seeds).

`--speed` measures decoding and prefill of 1 to 256 sequences at width 512 alone, and keeps its rows in
claims/results/mixtral_speed.csv; failed if the sparse model is not 1.5 times as fast as the dense one of its total size
everywhere.

    python claims/mixtral.py     3 seeds, about 12 minutes on one core; rows in claims/results/mixtral.csv
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial
from statistics import fmean, median

import torch
from common.small import LENGTH, WIDTH, divided, llama, parser, trained
from common.statistics import paired
from common.text import text_by_domain
from common.turns import by_turns
from results import append
from torch import Tensor, nn

from moeify import Recipe, sparsify
from moeify.routers import TopK
from moeify.serve.decode import cache_name
from moeify.sparsify import fresh

DOMAINS = ("novel", "code_python", "drama")
EXPERTS, K = 8, 2
ARMS = {"active": K, "sparse": EXPERTS, "total": EXPERTS}
"""The hidden units of each arm, of all its experts, in multiples of twice the width."""
WIDE = 512
PROMPT, TOKENS, ROUNDS = 16, 32, 5
BATCHES = (1, 16, 64, 256)


def built(arm: str, width: int = WIDTH) -> nn.Module:
    if arm != "sparse":
        return llama(2 * width * ARMS[arm], width=width)
    recipe = Recipe(num_experts=EXPERTS, router=partial(TopK, k=K), experts=fresh)
    return sparsify(llama(2 * width, width=width), recipe, verbose=False)


@torch.no_grad()
def speeds(models: Mapping[str, nn.Module], batch: int) -> dict[str, float]:
    """Tokens per second of CPU time that each model decodes, the median of rounds in which the models take turns."""
    seconds: dict[str, list[float]] = {arm: [] for arm in models}
    prompt = torch.randint(256, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    for _ in range(ROUNDS):
        for arm, model in models.items():
            out = model.eval()(input_ids=prompt, use_cache=True)
            began = time.process_time()
            for _ in range(TOKENS):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, **{cache_name(model): out.past_key_values}, use_cache=True)
            seconds[arm].append(time.process_time() - began)
    return {arm: batch * TOKENS / median(values) for arm, values in seconds.items()}


@torch.no_grad()
def prefill(model: nn.Module, prompt: Tensor) -> None:
    model(input_ids=prompt, use_cache=True)


@torch.no_grad()
def decode(model: nn.Module, prompt: Tensor) -> None:
    """A prompt of one token and 16 more, so that nearly all of it is decoding."""
    out = model(input_ids=prompt[:, :1], use_cache=True)
    for _ in range(16):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, **{cache_name(model): out.past_key_values}, use_cache=True)


def speed(chosen: argparse.Namespace) -> None:
    rows = []
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        models = {arm: built(arm, WIDE).eval() for arm in ARMS}
        for batch in BATCHES:
            prompt = torch.randint(256, (batch, 64))
            for name, work, tokens in (("decode", decode, 17), ("prefill", prefill, 64)):
                taken = by_turns({arm: partial(work, model, prompt) for arm, model in models.items()})
                rows += [
                    {
                        "hardware": chosen.hardware, "seed": seed, "pass": name, "batch": batch, "arm": arm,
                        "tokens_per_s": f"{batch * tokens / seconds:.1f}",
                    }
                    for arm, seconds in taken.items()
                ]  # fmt: skip
                ratios = ", ".join(f"{taken[arm] / taken['sparse']:.2f} {arm}" for arm in ("total", "active"))
                print(f"seed {seed}, {name} of {batch}: times as fast as {ratios}", flush=True)
    means = {
        (name, batch, arm): fmean(
            float(row["tokens_per_s"]) for row in rows if (row["pass"], row["batch"], row["arm"]) == (name, batch, arm)
        )
        for name in ("decode", "prefill") for batch in BATCHES for arm in ARMS
    }  # fmt: skip
    least = min(means[name, batch, "sparse"] / means[name, batch, "total"] for name, batch, _ in means)
    result = "reproduced" if least >= 1.5 else "failed"
    print(f"at least {least:.2f} times as fast as the total size: {result}")
    for row in rows:
        append("mixtral_speed", row | {"result": result})


def main() -> None:
    asked = parser(__doc__, steps=300)
    asked.add_argument("--speed", action="store_true", help="decoding and prefill of 1 to 256 sequences alone")
    chosen = asked.parse_args()
    torch.set_num_threads(1)
    if chosen.speed:
        speed(chosen)
    else:
        quality(chosen)


def quality(chosen: argparse.Namespace) -> None:
    learnt, unseen = text_by_domain(DOMAINS, 1_500_000, LENGTH)
    arms = {arm: partial(built, arm) for arm in ARMS}
    ends, rows = trained("mixtral", "arm", arms, chosen, data=divided(learnt, unseen), batch=16)
    faster = []
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        for width, batch in ((WIDTH, 1), (WIDE, 1), (WIDE, 64)):
            found = speeds({arm: built(arm, width) for arm in ARMS}, batch)
            for row in (row for row in rows if row["seed"] == seed):
                row[f"tokens_per_s_width_{width}_batch_{batch}"] = f"{found[row['arm']]:.1f}"
            print(f"width {width}, batch {batch}:", ", ".join(f"{arm} {speed:.0f}/s" for arm, speed in found.items()))
            if width == WIDTH:
                faster.append(found["sparse"] / found["total"])
    for arm in ("active", "total"):
        print(f"sparse less {arm}: {paired(ends['sparse'], ends[arm])}")
    way = (fmean(ends["active"]) - fmean(ends["sparse"])) / (fmean(ends["active"]) - fmean(ends["total"]))
    print(f"{way:.2f} of the way from active to total; decodes {median(faster):.2f} times as fast as total")
    ahead = all(a < b for a, b in zip(ends["sparse"], ends["active"], strict=True))
    result = "reproduced" if ahead and median(faster) >= 1.5 else "failed"
    print(result)
    for row in rows:
        append("mixtral", row | {"result": result})


if __name__ == "__main__":
    main()
