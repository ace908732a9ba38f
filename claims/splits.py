"""Right after splitting: how much of a dense model each way to divide its hidden units among experts keeps.

LLaMA-MoE (arXiv 2406.16554) and MoEfication (arXiv 2110.01786) divide the hidden units at random, by their weights, by
which are active together, or by how much clusters of data need them. Somebody else's dense model, stories260K, is split
into 4 experts of 43 units, of which 1, 2 or 3 run, and its loss on held-out novels measured without training. The
router is the same for all: it takes the k experts whose outputs are longest (a competition, which runs all), each with
the weight 1, or E / k. Importance is measured on other novels.

Predicted before the first run, at k = 2 and the better of both weights: (1) clusters of weights, co-activation and
neuron-sharing "inner" each keep more than random; (2) a shared expert ("residual", 1 shared and 3 routed experts, k - 1
of which run, at equal work), measured by gradients, keeps more than random; (3) the weight 1 is ahead of E / k, for the
experts that are left out are those that say least. "reproduced" asks for (1) and (2), as means over three seeds.

    python claims/splits.py      3 seeds, about 3 minutes on one core; rows in claims/results/splits.csv
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import fmean, stdev

import torch
import transformers
from jaxtyping import Float
from results import append
from torch import Tensor, nn

from moeify import Context, Recipe, sparsify
from moeify.data.claim_files import data_file
from moeify.layers import moe_layers
from moeify.routers import Router
from moeify.routers.base import k_best, real_tokens
from moeify.routing import Assignment
from moeify.sparsify import residual, residual_splits, splits
from moeify.sparsify.split import (
    clustered,
    coactivated,
    importance,
    independent,
    inner,
    measure_coactivation,
    measure_importance,
    measure_token_importance,
    random,
)
from moeify.sparsify.split.clustered import balanced_clusters

EXPERTS, LENGTH = 4, 256
Made = tuple[Callable, Callable | None]


class Loudest(Router):
    """The k experts whose outputs are longest, each with the same weight."""

    def __init__(self, width: int, num_experts: int, *, k: int, weight: float = 1.0) -> None:
        super().__init__()
        self.num_experts, self.k, self.weight = num_experts, k, weight

    def attach(self, experts: nn.Module) -> None:
        self._experts = (experts,)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        tokens = real_tokens(x, context)
        best, indices = k_best(self._experts[0].all_outputs(tokens.x).norm(dim=-1), self.k)
        return tokens.assign(indices, torch.full_like(best, self.weight), self.num_experts)


def stories() -> transformers.PreTrainedModel:
    folder = data_file("stories260k/hf/model.safetensors").parent
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def novels(part: str, count: int) -> Tensor:
    """Blocks of tokens of the domain `novel`, (count, LENGTH), spread over its texts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(data_file("stories260k/hf/tokenizer.json").parent)
    with gzip.open(data_file(f"text-domains/{part}.jsonl.gz"), "rt") as lines:
        texts = [row["text"] for row in map(json.loads, lines) if row["domain"] == "novel"]
    return torch.stack([torch.tensor(tokenizer.encode(text[: 8 * LENGTH])[:LENGTH]) for text in texts[:count]])


@torch.no_grad()
def loss(model: nn.Module, ids: Tensor) -> float:
    return fmean(model(input_ids=b, labels=b).loss.item() for b in ids.split(8))


def made(method: str, model: nn.Module, batches: list[dict[str, Tensor]], per_expert: list[list]) -> Made:
    """How experts, and what is shared, are made; what has to be measured is measured on the model."""
    if method == "residual by gradients":
        measured = measure_token_importance(model, batches, EXPERTS - 1, tokens=2048)
        beside = partial(residual, importance=measured)
        return partial(residual_splits, importance=measured), beside
    if method == "residual by weights":
        return residual_splits, residual
    split: Callable = {
        "random": lambda: random,
        "clustered": lambda: clustered,
        "importance": lambda: importance,
        "coactivated": lambda: partial(coactivated, importance=measure_coactivation(model, batches)),
        "independent by gradients": lambda: partial(independent, importance=measure_importance(model, per_expert)),
        "inner by gradients": lambda: partial(inner, importance=measure_importance(model, per_expert)),
    }[method]()
    return partial(splits, split=split, scale=1.0), None


METHODS = [
    "random", "importance", "clustered", "coactivated", "independent by gradients", "inner by gradients",
    "residual by weights", "residual by gradients",
]  # fmt: skip


def clusters(ids: Tensor, model: nn.Module) -> list[list[dict[str, Tensor]]]:
    """The texts in clusters of one size, by the mean of the model's last hidden states."""
    with torch.no_grad():
        means = torch.cat([model.model(b).last_hidden_state.mean(1) for b in ids.split(8)])
    members = balanced_clusters(means - means.mean(0), EXPERTS)
    return [[{"input_ids": ids[m], "labels": ids[m]}] for m in members]


def split_up(method: str, known: Tensor, seed: int) -> tuple[nn.Module, int]:
    """The model, split, and how many of the experts that run are shared."""
    torch.manual_seed(seed)
    model = stories()
    batches = [{"input_ids": b, "labels": b} for b in known.split(8)]
    experts, shared = made(method, model, batches, clusters(known, model))
    routed, beside = (EXPERTS, {}) if shared is None else (EXPERTS - 1, {"shared": shared})
    recipe = Recipe(num_experts=routed, router=partial(Loudest, k=1), experts=experts, **beside)
    return sparsify(model, recipe, verbose=False), len(beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known, held = novels("train", 64), novels("validation", 16)
    before = loss(stories(), held)
    print(f"before: {before:.4f} nats per token")
    found: dict[tuple[str, int, bool], list[float]] = {}
    rows = []
    for seed in options.seeds:
        for method in METHODS:
            model, shared = split_up(method, known, seed)
            for k, scaled in product((1, 2, 3), (False, True)):
                if k == shared:
                    continue  # the shared expert alone is no mixture
                weight = (EXPERTS - shared) / (k - shared) if scaled else 1.0
                for layer in moe_layers(model).values():
                    layer.router.k, layer.router.weight = k - shared, weight
                after = loss(model, held)
                found.setdefault((method, k, scaled), []).append(after)
                rows.append({
                    "hardware": options.hardware, "method": method, "experts": EXPERTS, "running": k,
                    "weight": f"{weight:.3f}", "seed": seed, "perplexity_before": f"{math.exp(before):.3f}",
                    "perplexity_after": f"{math.exp(after):.3f}", "loss_after": f"{after:.4f}",
                })  # fmt: skip
    for (method, k, scaled), values in found.items():
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        print(f"{method:26} {k} of {EXPERTS}, weight {'E / k' if scaled else '1':5}: {fmean(values):.4f}{spread}")
    at = {m: min(fmean(found[m, 2, scaled]) for scaled in (False, True)) for m in METHODS}
    ahead = [at[m] < at["random"] for m in ("clustered", "coactivated", "inner by gradients", "residual by gradients")]
    result = "reproduced" if all(ahead) else "failed"
    print(result)
    for row in rows:
        append("splits", row | {"result": result})


if __name__ == "__main__":
    main()
