"""The cost model of experts predicts how long an H100 takes for shapes that it was not fitted on.

AIConfigurator (Apache-2.0) publishes times of MoE layers on an NVIDIA H100, measured in vLLM 0.24: 201 shapes (width,
hidden width, k, experts, tensor and expert parallelism) of 16 models in bf16, of 1 to 16,384 tokens, with balanced and
skewed routing. `moeify.parallel.GroupedCost` has ten numbers. They are fitted on the balanced times of half of the
shapes, chosen by a seed, and predict the other half; then the same ten numbers predict how much longer the fullest
device takes under routing by a power law, which they have not seen at all.

Decided before the first run on a second half: the form of the model was chosen on the first half of seed 0 alone (two
halves of it against each other: errors of 10.1 and 9.2 %). Over seeds 0 to 4 the mean absolute error must be at most
12 % and Spearman's rank correlation at least 0.98, each as the mean over seeds; a fit of three terms, launch + bytes of
weights + FLOPs, stands beside it. Skewed over balanced time (power law 1.2, 4,096 tokens and more) must be within 10 %
of the measured one at 2, 4, 8, 16 and 32 devices, as medians over the shapes of the second half. The generator of loads
is AIConfigurator's rule: shares of E experts by a power law between 1 and 0.8 T, at most T rows each, and the fullest
device is timed; a prediction is the mean over 16 draws.

    python claims/h100_layers.py      5 seeds, about 2 minutes on one core; rows in claims/results/h100_layers.csv
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from statistics import fmean

import torch
from common.statistics import rank_correlation
from jaxtyping import Float
from results import append
from torch import Tensor

from moeify.data.claim_files import data_file
from moeify.parallel.grouped import ExpertWork, GroupedCost

FLOPS, BANDWIDTH = 989e12, 3.35e12
SHAPE = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
PLAIN = {(2688, 1856), (2048, 5120)}
"""Width and hidden width of the Nemotron models, whose experts have two matrices instead of three."""
DEVICES, DRAWS = (2, 4, 8, 16, 32), 16


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    tokens: int
    shape: tuple[int, ...]
    seconds: float

    def work(self, counts: Float[Tensor, "... E"]) -> ExpertWork:
        width, hidden, k, experts, slices, _ = self.shape
        return ExpertWork.of(
            counts, width=width, hidden=hidden / slices, matrices=2 if (width, hidden) in PLAIN else 3,
            experts=experts, passing=float(self.tokens * k),
        )  # fmt: skip

    def balanced(self) -> ExpertWork:
        _, _, k, experts, _, devices = self.shape
        here, rows = experts // devices, max(1, round(self.tokens * k / devices))
        return self.work(torch.full((here,), rows // here) + (torch.arange(here) < rows % here))

    def skewed(self, alpha: float, generator: torch.Generator) -> ExpertWork:
        """Of the fullest device, for `DRAWS` draws."""
        _, _, k, experts, _, devices = self.shape
        tokens = self.tokens
        low, high = (1.0, 0.8 * tokens) if tokens * k > experts else (0.01, 2.0)
        u = torch.rand(DRAWS, experts, generator=generator, dtype=torch.float64)
        a = 1 - alpha
        drawn = ((high**a - low**a) * u + low**a) ** (1 / a)
        rows = drawn / drawn.sum(1, keepdim=True) * tokens * k
        while (over := (rows - tokens).clamp_min(0).sum(1, keepdim=True)).max() > 1:
            rows = rows.clamp_max(tokens)
            room = (rows < tokens).double()
            rows = rows + over * room / room.sum(1, keepdim=True).clamp_min(1)
        rows = rows.round().view(DRAWS, devices, experts // devices)
        return self.work(rows[torch.arange(DRAWS), rows.sum(2).argmax(1)])


def cases(distribution: str) -> list[Case]:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(data_file("moe-timings/h100-moe.parquet")).to_pylist()
    return [
        Case(row["num_tokens"], tuple(row[name] for name in SHAPE), row["latency"] / 1000)
        for row in rows
        if row["moe_dtype"] == "bfloat16" and row["distribution"] == distribution
    ]


def predicted(cost: GroupedCost, works: list[ExpertWork]) -> Float[Tensor, "N"]:
    return cost.seconds(ExpertWork.cat(works), FLOPS, BANDWIDTH)


def error(ours: Float[Tensor, "N"], real: Float[Tensor, "N"]) -> float:
    return float((ours / real - 1).abs().mean())


def three_terms(works: list[ExpertWork], real: Float[Tensor, "N"], fitted: Tensor) -> Float[Tensor, "N"]:
    """launch + bytes / B + FLOPs / F by least squares of relative errors, with no number below 0."""
    work = ExpertWork.cat(works)
    terms = torch.stack([torch.ones_like(real), work.weights, work.flops], 1)
    scale = terms.mean(0)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = ((terms / scale @ x.exp())[fitted] * real.mean() / real[fitted]).log().abs().mean()
        value.backward()
        return value

    search.step(loss)
    return (terms / scale @ x.detach().exp()) * real.mean()


def run(seed: int, balanced: list[Case], skewed: list[Case]) -> dict[str, float]:
    shapes = sorted({case.shape for case in balanced})
    random.Random(seed).shuffle(shapes)
    first = set(shapes[: (len(shapes) + 1) // 2])
    works, real = [case.balanced() for case in balanced], torch.tensor([case.seconds for case in balanced]).double()
    fitted = torch.tensor([case.shape in first for case in balanced])
    cost = GroupedCost.fit(ExpertWork.cat(works)[fitted], real[fitted], FLOPS, BANDWIDTH)
    ours = predicted(cost, works)
    trivial = three_terms(works, real, fitted)
    held = ~fitted
    found = {
        "error": error(ours[held], real[held]), "rank": rank_correlation(ours[held], real[held]),
        "error_fitted": error(ours[fitted], real[fitted]),
        "error_three_terms": error(trivial[held], real[held]),
        "rank_three_terms": rank_correlation(trivial[held], real[held]),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    before = {(c.tokens, c.shape): (c.seconds, float(y)) for c, y in zip(balanced, ours, strict=True)}
    for devices in DEVICES:
        those = [c for c in skewed if c.tokens >= 4096 and c.shape[-1] == devices and c.shape not in first]
        times = predicted(cost, [c.skewed(1.2, generator) for c in those]).view(-1, DRAWS).mean(1)
        measured = torch.tensor([c.seconds / before[c.tokens, c.shape][0] for c in those]).median()
        expected = torch.tensor([float(t) / before[c.tokens, c.shape][1] for t, c in zip(times, those, strict=True)])
        found |= {f"ratio_{devices}": float(measured), f"ratio_predicted_{devices}": float(expected.median())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    balanced, skewed = cases("balanced"), cases("power_law_1.2")
    rows = [{"seed": seed} | run(seed, balanced, skewed) for seed in options.seeds]
    mean = {name: fmean(row[name] for row in rows) for name in rows[0] if name != "seed"}
    ratios = [mean[f"ratio_predicted_{d}"] / mean[f"ratio_{d}"] - 1 for d in DEVICES]
    print("\n".join(f"{name:22} {value:.4f}" for name, value in mean.items()))
    print("skewed over balanced, predicted against measured:", *(f"{100 * r:+.1f} %" for r in ratios))
    passed = mean["error"] <= 0.12 and mean["rank"] >= 0.98 and max(map(abs, ratios)) <= 0.10
    result = "reproduced" if passed else "failed"
    print(result)
    for row in rows:
        values = {name: f"{value:.4f}" for name, value in row.items() if name != "seed"}
        append("h100_layers", {"hardware": "none; times of an H100", "seed": row["seed"]} | values | {"result": result})


if __name__ == "__main__":
    main()
