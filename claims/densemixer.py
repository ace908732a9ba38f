"""DenseMixer (github.com/yaof20/DenseMixer): fine-tuning gains if the router learns from all experts. Disputed.

The authors report +2.2 to +3.7 points for Qwen1.5-MoE, OLMoE and Qwen3-30B; marin-community/marin#7427 found neither a
gain nor other routing for Qwen3-30B. Here a small byte-level model with 8 experts, top-2, learns three domains of real
text, and is then fine-tuned on a fourth: as ever, with a frozen router, with DenseMixer, and as ever for as many steps
as cost DenseMixer's FLOPs (three forward passes of what runs, plus one of the experts that were not chosen).

Reproduced if DenseMixer's held-out loss on the fourth domain is lower than that of fine-tuning as ever, with the 95 %
interval of the paired differences below 0, at equal tokens and at equal FLOPs.

Predicted before the first run: failed. At equal tokens within 0.005 nats per byte, a little lower if anything; at equal
FLOPs higher by 0.005 to 0.03; the frozen router as good as the trained one within 0.01. The routers' gradient at the
start points elsewhere (cosine below 0.9), and still the final choices differ from those of fine-tuning as ever no more
than another order of the data makes them differ. (A first run, of a model twice as wide, was stopped before any
fine-tuning ended: it took too long on a busy machine. The model was shrunk after that run had shown two numbers, the
cosine, 0.78, and the loss of the model before fine-tuning.)

    python claims/densemixer.py   5 seeds, under a minute each on a free core; appends to claims/results/densemixer.csv
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from functools import cache
from statistics import fmean

import torch
import transformers
from common.rates import UNREPORTED, add_rates, rates_of
from common.statistics import paired
from common.text import text_by_domain
from common.training import drawn, held_out, of_domain, train
from results import append
from torch import Tensor, nn

from moeify import Recipe, record, sparsify
from moeify.data import ByteTokenizer
from moeify.flops import count
from moeify.layers import sparse_layers
from moeify.sparsify import fresh
from moeify.train import dense_router_gradient
from moeify.train.freeze import freeze

LEARNT, NEW = ("novel", "docs_fr", "math"), "code_python"
CAP, LENGTH, BATCH = 300_000, 64, 8
BASE, TUNE = 300, 80
BASE_RATE = 2e-3
ARMS = ("as ever", "frozen router", "DenseMixer", "as ever, FLOPs of DenseMixer")
OTHER_ORDER = "as ever, other order of data"
"""Another arm, at the rate of the first."""


def model() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return sparsify(transformers.LlamaForCausalLM(config), Recipe(num_experts=8, experts=fresh), verbose=False)


@torch.no_grad()
def choices(sparse: nn.Module, ids: Tensor) -> list[Tensor]:
    """Which experts each layer uses for which token, (T, E) per layer."""
    with record(sparse.eval()) as decisions:
        sparse(input_ids=ids)
    return [routing.reads() for routing in decisions.values()]


def differing(one: list[Tensor], other: list[Tensor]) -> float:
    """The share of choices that are not the other's."""
    return fmean((a & ~b).sum().item() / a.sum().item() for a, b in zip(one, other, strict=True))


def cosine(sparse: nn.Module, ids: Tensor) -> float:
    """Of the routers' gradient as ever with that of DenseMixer, on the task's loss."""
    weights = [layer.router.weight for layer in sparse_layers(sparse).values() if layer.router is not None]
    found = []
    for way in (nullcontext(), dense_router_gradient(sparse)):
        with way:
            task = sparse.train()(input_ids=ids, labels=ids).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(task, weights)]))
    return nn.functional.cosine_similarity(*found, dim=0).item()


def step_costs(sparse: nn.Module) -> float:
    """How much more a step of DenseMixer costs: one forward pass of the experts that were not chosen."""
    size = count(sparse, LENGTH)
    return 1 + (size.dense_flops - size.flops) / (3 * size.flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_rates(parser, 5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    parser.set_defaults(steps=TUNE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    learnt, unseen = text_by_domain((*LEARNT, NEW), CAP, LENGTH)
    old = torch.cat([of_domain(learnt, domain) for domain in LEARNT])
    new, test = of_domain(learnt, NEW), of_domain(unseen, NEW)
    test, choosing = test[:256], test[256:512]
    cost = step_costs(model())

    @cache
    def base_of(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return train(model(), drawn(old, batch=BATCH), BASE, seed, BASE_RATE)

    def run(arm: str, seed: int, rate: float) -> tuple[nn.Module, int]:
        """The model after fine-tuning, and the steps that it took."""
        tuned = copy.deepcopy(base_of(seed))
        if arm == "frozen router":
            freeze(tuned, "router", verbose=False)
        steps = round(TUNE * cost) if "FLOPs" in arm else TUNE
        with dense_router_gradient(tuned) if arm == "DenseMixer" else nullcontext():
            train(tuned, drawn(new, batch=BATCH), steps, seed + (200 if "other" in arm else 100), rate)
        return tuned, steps

    rates = rates_of("densemixer", ARMS, options, lambda arm, rate: held_out(run(arm, UNREPORTED, rate)[0], choosing))
    ends: dict[str, list[float]] = {}
    for seed in options.seeds:
        turned = cosine(copy.deepcopy(base_of(seed)), new[:BATCH])
        usual: list[Tensor] = []
        for arm, rate in {"base": 0.0, **rates, OTHER_ORDER: rates["as ever"]}.items():
            tuned, steps = (base_of(seed), 0) if arm == "base" else run(arm, seed, rate)
            found, chosen = held_out(tuned, test), choices(tuned, test[:32])
            usual = chosen if arm == "as ever" else usual
            ends.setdefault(arm, []).append(found)
            moved = f"{differing(chosen, usual):.4f}" if usual else ""
            append("densemixer", {
                "arm": arm, "seed": seed, "steps": steps, "tokens": steps * BATCH * LENGTH, "loss": f"{found:.4f}",
                "choices_unlike_as_ever": moved, "cosine_of_gradients": f"{turned:.4f}",
                "cost_of_a_step": f"{cost:.4f}", "hardware": options.hardware, "result": "run", "rate": rate,
            })  # fmt: skip
            print(f"seed {seed}  {arm:30} {found:.4f}  {moved}  cosine {turned:.3f}", flush=True)
    ever, longer_ever, mixer = ends["as ever"], ends["as ever, FLOPs of DenseMixer"], ends["DenseMixer"]
    print("DenseMixer - as ever, equal tokens:", paired(mixer, ever))
    print("DenseMixer - as ever, equal FLOPs:", paired(mixer, longer_ever))
    print("frozen router - as ever:", paired(ends["frozen router"], ever))


if __name__ == "__main__":
    main()
