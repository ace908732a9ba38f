"""A balancing bench: how fast, how well and at what price the ways to balance experts work.

One small byte-level model per arm and seed on eight domains of real text; every micro-batch holds one domain, as in
data-parallel training without shuffling, so the scope of a loss matters. Reported per arm: steps until the step's
MaxVio stays below 0.5, MaxVio per micro-batch and per step at the end, validation loss, and the mutual information of
expert and domain.

    python claims/balance.py            3 seeds; appends to claims/results/balance.csv, draws claims/results/balance.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch
import transformers
from common.text import text_by_domain
from results import RESULTS, append
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moeify import Recipe, losses, record, sparsify
from moeify.balance import SMEBU, Proportional, Quantile, Rule, Sign, control
from moeify.data import ByteTokenizer
from moeify.data.blocks import Blocks
from moeify.inspect import expert_load
from moeify.routers import TopK
from moeify.routing import Assignment
from moeify.sparsify import fresh
from moeify.statistics import max_violation

DOMAINS = ("novel", "math", "code_python", "code_rust", "shell", "docs_ko", "docs_zh", "docs_fr")
CAP, LENGTH, BATCH, MICRO_BATCHES = 1_000_000, 128, 4, 4
EXPERTS, K, WEIGHT = 8, 2, 1e-2

Decisions = dict[str, Assignment]
Loss = Callable[[Decisions, dict[str, Tensor]], Tensor | float]


def none(decisions: Decisions, demand: dict[str, Tensor]) -> float:
    return 0.0


def pooled(decisions: Decisions, demand: dict[str, Tensor]) -> Tensor:
    """As transformers computes it: all layers in one pot. Its floor is k, so it is divided by k."""
    logits = tuple(routing.logits for routing in decisions.values())
    return load_balancing_loss_func(logits, EXPERTS, K) / K


def per_layer(decisions: Decisions, demand: dict[str, Tensor], scope: losses.Scope = "batch") -> Tensor:
    return torch.stack([losses.balance(routing, scope) for routing in decisions.values()]).mean()


def global_batch(decisions: Decisions, demand: dict[str, Tensor]) -> Tensor:
    even = torch.ones(EXPERTS)
    return torch.stack([losses.balance(r, assigned=demand.get(name, even)) for name, r in decisions.items()]).mean()


ARMS: dict[str, tuple[Loss, Rule | None]] = {
    "none": (none, None),
    "loss, layers pooled": (pooled, None),
    "loss, micro-batch": (per_layer, None),
    "loss, sequence": (partial(per_layer, scope="sequence"), None),
    "loss, global": (global_batch, None),
    "sign 1e-3": (none, Sign(1e-3)),
    "sign 1e-2": (none, Sign(1e-2)),
    "proportional 1e-2": (none, Proportional(1e-2)),
    "SMEBU": (none, SMEBU()),
    "quantile": (none, Quantile()),
}


def build(has_bias: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    router = partial(TopK, k=K, selection_bias=has_bias)
    recipe = Recipe(num_experts=EXPERTS, router=router, experts=partial(fresh, granularity=K))
    return sparsify(transformers.LlamaForCausalLM(config), recipe, verbose=False)


@dataclass
class Trace:
    """MaxVio of every step: of its micro-batches on average, and of all of them together."""

    micro: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def steps_until(self, bound: float, window: int = 10) -> int | None:
        means = [fmean(self.step[i : i + window]) for i in range(len(self.step) - window + 1)]
        return next((i + 1 for i, mean in enumerate(means) if mean < bound), None)


def train(arm: str, data: Blocks, steps: int, seed: int) -> tuple[nn.Module, Trace]:
    loss, rule = ARMS[arm]
    torch.manual_seed(seed)
    model = build(has_bias=rule is not None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    if rule is not None:
        control(model, optimizer, rule)
    members = [torch.nonzero(data.domain == d).flatten() for d in range(len(DOMAINS))]
    dice = torch.Generator().manual_seed(seed)
    trace, previous = Trace(), {}
    for _ in range(steps):
        asked: dict[str, Tensor] = {}
        micro = []
        for domain in torch.randperm(len(DOMAINS), generator=dice)[:MICRO_BATCHES].tolist():
            chosen = members[domain][torch.randint(len(members[domain]), (BATCH,), generator=dice)]
            ids = torch.stack([data[int(i)]["input_ids"] for i in chosen])
            with record(model) as decisions:
                task = model(input_ids=ids, labels=ids).loss
            ((task + WEIGHT * loss(decisions, previous)) / MICRO_BATCHES).backward()
            for name, routing in decisions.items():
                asked[name] = asked.get(name, 0) + routing.assigned
                micro.append(max_violation(routing.assigned).item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        previous = asked
        trace.micro.append(fmean(micro))
        trace.step.append(fmean(max_violation(demand).item() for demand in asked.values()))
    return model, trace


@torch.no_grad()
def held_out(model: nn.Module, data: Blocks, count: int = 256) -> float:
    model.eval()
    chosen = torch.arange(0, len(data), max(1, len(data) // count))
    ids = torch.stack([data[int(i)]["input_ids"] for i in chosen])
    return fmean(model(input_ids=part, labels=part).loss.item() for part in ids.split(16))


def draw(traces: dict[str, Trace], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for arm, trace in traces.items():
        smooth = [fmean(trace.step[max(0, i - 9) : i + 1]) for i in range(len(trace.step))]
        axis.plot(smooth, label=arm)
    axis.set(xlabel="optimizer step", ylabel="MaxVio of the step, mean over layers (10-step mean)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, validation = text_by_domain(DOMAINS, CAP, LENGTH)
    traces, ends = {}, {}
    for arm in options.arms:
        for seed in range(options.seeds):
            model, trace = train(arm, data, options.steps, seed)
            traces.setdefault(arm, trace)
            bits = expert_load(model, validation).information.mean().item()
            loss = held_out(model, validation)
            ends.setdefault(arm, []).append(loss)
            vio = f"{fmean(trace.step[-50:]):.3f}"
            append("balance", {
                "arm": arm, "seed": seed, "steps": options.steps,
                "steps_until_max_vio_below_half": trace.steps_until(0.5),
                "max_vio_micro_batch": f"{fmean(trace.micro[-50:]):.3f}", "max_vio_step": vio,
                "validation_loss": f"{loss:.4f}", "expert_domain_bits": f"{bits:.4f}",
            })  # fmt: skip
            print(f"{arm}, seed {seed}: loss {loss:.4f}, MaxVio {vio}, {bits:.3f} bits", flush=True)
    for arm, values in ends.items():
        print(f"{arm}: validation loss {fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else ""))
    draw(traces, RESULTS / "balance.png")


if __name__ == "__main__":
    main()
