"""Branch-Train-MiX (arXiv 2403.07816, section 4): experts trained apart beat one model trained on the same data.

A small byte-level model learns four domains of real text for a while and is branched; each branch goes on with one
domain alone. The branches are then merged into one sparse model (top-2), whose router, or the whole of which, learns
a little from all four. Against it: each branch alone, the mean of the branches' weights, and the base model trained on
with all four domains at equal tokens and at equal training FLOPs (counted as if routers alone cost a full backward
pass). "Own expert" is what the merged model would do if it were told the domain.

    python claims/branch_train_mix.py   3 seeds, about 4 minutes each; appends to claims/results/branch_train_mix.csv

`--tune` chooses one rate for branches and mix, by the merged model that is trained whole, and one for the dense model,
by that of equal tokens.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import cache, partial
from statistics import fmean, stdev

import torch
import transformers
from common.bases import trained_base
from common.rates import UNREPORTED, add_rates, parted, rates_of
from common.text import text_by_domain
from common.training import average, drawn, held_out, of_domain, train
from results import append
from torch import Tensor, nn

from moeify import merge_models, record
from moeify.compose import route_all_to
from moeify.data import ByteTokenizer
from moeify.flops import count
from moeify.origin import Origin
from moeify.train.freeze import freeze

DOMAINS = ("novel", "math", "code_python", "docs_fr")
CAP, LENGTH, BATCH = 900_000, 128, 16
BASE, BRANCH, MIX = 1000, 120, 100
BASE_RATE, RATE = 2e-3, 5e-4


def dense() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@torch.no_grad()
def own_share(model: nn.Module, unseen: dict[str, Tensor]) -> float:
    """The share of held-out tokens whose first choice is the expert of their domain, mean over layers and domains."""
    shares = []
    for e, ids in enumerate(unseen.values()):
        with record(model.eval()) as decisions:
            model(input_ids=ids[:64])
        shares += [(routing.logits.argmax(-1) == e).float().mean().item() for routing in decisions.values()]
    return fmean(shares)


def based(seed: int, learnt: dict[str, Tensor], steps: int) -> nn.Module:
    """What is branched: a model that learns all domains for so many steps."""
    torch.manual_seed(seed)
    learn = partial(train, batches=drawn(*learnt.values(), batch=BATCH), steps=steps, seed=seed, rate=BASE_RATE)
    return trained_base(dense(), learn, *learnt.values(), batch=BATCH)


def branched(base: nn.Module, learnt: dict[str, Tensor], seed: int, rate: float) -> dict[str, nn.Module]:
    """A model for every domain, which learns that domain alone."""
    return {
        domain: train(copy.deepcopy(base), drawn(ids, batch=BATCH), BRANCH, seed + 100, rate)
        for domain, ids in learnt.items()
    }


def mixed(model: nn.Module, learnt: dict[str, Tensor], seed: int, rate: float) -> nn.Module:
    """The merged model after what is free in it has learnt a little from all domains."""
    return train(model, drawn(*learnt.values(), batch=BATCH), MIX, seed + 200, rate)


def examples(learnt: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Of every domain, what sets the router."""
    return {domain: list(ids[:8].split(1)) for domain, ids in learnt.items()}


def arms(
    base: nn.Module, learnt: dict[str, Tensor], seed: int, merged_rate: float, dense_rate: float
) -> Iterator[tuple[str, nn.Module, int]]:
    """Every arm: its name, its model, and the steps that were trained for it after the base."""
    yield "base", base, 0
    branches = branched(base, learnt, seed, merged_rate)
    for domain, branch in branches.items():
        yield f"branch {domain}", branch, BRANCH
    apart = BRANCH * len(DOMAINS)
    yield "mean of the branches", average(list(branches.values())), apart

    yield "merged, random router", merge_models(branches, verbose=False), apart
    for rest, given in (("mean", None), ("base", base)):
        model = merge_models(branches, base=given, router_init=examples(learnt), verbose=False)
        yield f"merged, rest {rest}, router from examples", model, apart
        routed = copy.deepcopy(model)
        freeze(routed, "base", "experts", verbose=False)
        yield f"merged, rest {rest}, router trained", mixed(routed, learnt, seed, merged_rate), apart + MIX
    whole = mixed(merge_models(branches, router_init=examples(learnt), verbose=False), learnt, seed, merged_rate)
    yield "merged, rest mean, all trained", whole, apart + MIX

    ratio = count(whole, LENGTH).flops / count(base, LENGTH).flops
    for name, steps in (("tokens", apart + MIX), ("FLOPs", apart + round(MIX * ratio))):
        yield f"dense, equal {name}", gone_on(base, learnt, steps, seed, dense_rate), steps


def gone_on(base: nn.Module, learnt: dict[str, Tensor], steps: int, seed: int, rate: float) -> nn.Module:
    """The base after it has learnt more of all domains."""
    return train(copy.deepcopy(base), drawn(*learnt.values(), batch=BATCH), steps, seed + 300, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--base", type=int, default=BASE, help="steps of the base; rows of others are in a file of their own"
    )
    add_rates(parser, RATE)
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    parser.set_defaults(steps=BRANCH * len(DOMAINS) + MIX)
    options = parser.parse_args()
    rows = "branch_train_mix" if options.base == BASE else f"branch_train_mix_{options.base}"
    torch.set_num_threads(1)
    train_part, validation = text_by_domain(DOMAINS, CAP, LENGTH)
    learnt = {domain: of_domain(train_part, domain) for domain in DOMAINS}
    unseen = {domain: of_domain(validation, domain)[:256] for domain in DOMAINS}
    ends: dict[str, list[float]] = {}

    parts = {domain: parted(len(ids)) for domain, ids in learnt.items()}
    rest, most = ({domain: ids[parts[domain][i]] for domain, ids in learnt.items()} for i in range(2))

    @cache
    def unreported_base() -> nn.Module:
        return based(UNREPORTED, most, options.base)

    def error(arm: tuple[str, int], rate: float) -> float:
        if arm[0] == "dense":
            model = gone_on(unreported_base(), most, options.steps, UNREPORTED, rate)
        else:
            branches = branched(unreported_base(), most, UNREPORTED, rate)
            merged = merge_models(branches, router_init=examples(most), verbose=False)
            model = mixed(merged, most, UNREPORTED, rate)
        return fmean(held_out(model, ids) for ids in rest.values())

    tried = [(way, options.base) for way in ("merged", "dense")]
    merged_rate, dense_rate = rates_of("branch_train_mix", tried, options, error).values()

    def report(arm: str, seed: int, steps: int, found: dict[str, float], model: nn.Module, share: str) -> None:
        mean = fmean(found.values())
        ends.setdefault(arm, []).append(mean)
        counted = count(model)
        append(rows, {
            "arm": arm, "seed": seed, "steps_after_base": steps, "tokens_after_base": steps * BATCH * LENGTH,
            "parameters": counted.parameters, "active_parameters": counted.active_parameters,
            **{f"loss_{domain}": f"{loss:.4f}" for domain, loss in found.items()}, "loss_mean": f"{mean:.4f}",
            "own_expert_first": share, "hardware": options.hardware,
            "rate": {"base": BASE_RATE, "dense": dense_rate}.get(arm.partition(",")[0], merged_rate),
        })  # fmt: skip
        told = "  ".join(f"{loss:.3f}" for loss in found.values())
        print(f"seed {seed}  {arm:42} {mean:.4f}   {told}  {share}", flush=True)

    for seed in options.seeds:
        base = based(seed, learnt, options.base)
        for arm, model, steps in arms(base, learnt, seed, merged_rate, dense_rate):
            found = {domain: held_out(model, ids) for domain, ids in unseen.items()}
            is_sparse = Origin.of(model).recipe is not None
            report(arm, seed, steps, found, model, f"{own_share(model, unseen):.3f}" if is_sparse else "")
            if arm == "merged, rest mean, router from examples":
                found = {}
                for domain, ids in unseen.items():
                    with route_all_to(model, domain):
                        found[domain] = held_out(model, ids)
                report("merged, rest mean, own expert", seed, steps, found, model, "1.000")
    for arm, values in ends.items():
        print(f"{arm}: {fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))


if __name__ == "__main__":
    main()
