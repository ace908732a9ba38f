"""Branch-Train-MiX (arXiv 2403.07816, section 4): experts trained apart beat one model trained on the same data.

A small byte-level model learns four domains of real text for a while and is branched; each branch goes on with one
domain alone. The branches are then merged into one sparse model (top-2), whose router, or the whole of which, learns
a little from all four. Against it: each branch alone, the mean of the branches' weights, and the base model trained on
with all four domains at equal tokens and at equal training FLOPs (counted as if routers alone cost a full backward
pass). "Own expert" is what the merged model would do if it were told the domain.

    python claims/branch_train_mix.py   3 seeds, about 4 minutes each; appends to claims/results/branch_train_mix.csv
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from statistics import fmean, stdev

import torch
import transformers
from common.bases import trained_base
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
BASE_RATE, RATE = 2e-3, 1e-3


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


def arms(seed: int, learnt: dict[str, Tensor], base_steps: int = BASE) -> Iterator[tuple[str, nn.Module, int]]:
    """Every arm: its name, its model, and the steps that were trained for it after the base."""
    torch.manual_seed(seed)
    everything = drawn(*learnt.values(), batch=BATCH)
    learn = partial(train, batches=everything, steps=base_steps, seed=seed, rate=BASE_RATE)
    base = trained_base(dense(), learn, *learnt.values(), batch=BATCH)
    yield "base", base, 0
    branches = {}
    for domain, ids in learnt.items():
        branches[domain] = train(copy.deepcopy(base), drawn(ids, batch=BATCH), BRANCH, seed + 100, RATE)
        yield f"branch {domain}", branches[domain], BRANCH
    apart = BRANCH * len(DOMAINS)
    yield "mean of the branches", average(list(branches.values())), apart

    examples = {domain: list(ids[:8].split(1)) for domain, ids in learnt.items()}
    yield "merged, random router", merge_models(branches, verbose=False), apart
    for rest, given in (("mean", None), ("base", base)):
        model = merge_models(branches, base=given, router_init=examples, verbose=False)
        yield f"merged, rest {rest}, router from examples", model, apart
        routed = copy.deepcopy(model)
        freeze(routed, "base", "experts", verbose=False)
        yield f"merged, rest {rest}, router trained", train(routed, everything, MIX, seed + 200, RATE), apart + MIX
    whole = train(merge_models(branches, router_init=examples, verbose=False), everything, MIX, seed + 200, RATE)
    yield "merged, rest mean, all trained", whole, apart + MIX

    ratio = count(whole, LENGTH).flops / count(base, LENGTH).flops
    for name, steps in (("tokens", apart + MIX), ("FLOPs", apart + round(MIX * ratio))):
        yield f"dense, equal {name}", train(copy.deepcopy(base), everything, steps, seed + 300, RATE), steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--base", type=int, default=BASE, help="steps of the base; rows of others are in a file of their own"
    )
    options = parser.parse_args()
    rows = "branch_train_mix" if options.base == BASE else f"branch_train_mix_{options.base}"
    torch.set_num_threads(1)
    train_part, validation = text_by_domain(DOMAINS, CAP, LENGTH)
    learnt = {domain: of_domain(train_part, domain) for domain in DOMAINS}
    unseen = {domain: of_domain(validation, domain)[:256] for domain in DOMAINS}
    ends: dict[str, list[float]] = {}

    def report(arm: str, seed: int, steps: int, found: dict[str, float], model: nn.Module, share: str) -> None:
        mean = fmean(found.values())
        ends.setdefault(arm, []).append(mean)
        counted = count(model)
        append(rows, {
            "arm": arm, "seed": seed, "steps_after_base": steps, "tokens_after_base": steps * BATCH * LENGTH,
            "parameters": counted.parameters, "active_parameters": counted.active_parameters,
            **{f"loss_{domain}": f"{loss:.4f}" for domain, loss in found.items()}, "loss_mean": f"{mean:.4f}",
            "own_expert_first": share,
        })  # fmt: skip
        told = "  ".join(f"{loss:.3f}" for loss in found.values())
        print(f"seed {seed}  {arm:42} {mean:.4f}   {told}  {share}", flush=True)

    for seed in options.seeds:
        for arm, model, steps in arms(seed, learnt, options.base):
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
