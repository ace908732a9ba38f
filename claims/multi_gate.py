"""MMoE (KDD 2018) and PLE (RecSys 2020): a gate per task keeps tasks apart that a shared bottom cannot.

Two regressions on the same 100 inputs, whose weight vectors have a cosine of ρ, by the formula of MMoE's section 3.2. A
shared layer, MMoE and CGC (one level of PLE) of equal parameters, each at the better of two learning rates by rows
that are neither learnt nor reported. Reported is mean squared error over variance on held-out rows, the mean of both
tasks. Design, prediction and thresholds are in claims/designs.md, written before the first run.

Reproduced if MMoE's error rises by less than that of the shared layer as ρ falls from 1 to 0, and is below it at ρ = 0
in every seed.

    python claims/multi_gate.py     3 seeds, about 4 minutes on one core; rows in claims/results/multi_gate.csv
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from statistics import fmean

import torch
from common.statistics import paired
from common.tasks import Towers, gated, layer, trained
from results import append
from torch import Tensor, nn

WIDTH, EXPERTS, UNITS, TASKS = 100, 8, 16, 2
SHARED = 126
"""Units of the shared layer, with which it has as many parameters as MMoE."""
RHO = (1.0, 0.5, 0.0)
RATES = (1e-3, 5e-3)
ROWS = {"learnt": 10_000, "choice": 2_000, "held out": 5_000}
BATCH, NOISE = 256, 0.1


def regressions(rho: float, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs (rows, 100) and labels (rows, 2) by part: w x + Σ sin(α_i w x + β_i) + noise, with |w| = 0.3.

    α and β are drawn until labels have ten times the variance of their noise; where slopes cancel, they have less.
    """
    dice = torch.Generator().manual_seed(1000 + seed)
    u, v = torch.linalg.qr(torch.randn(WIDTH, 2, generator=dice)).Q.T
    weights = 0.3 * torch.stack([u, rho * u + math.sqrt(1 - rho**2) * v])
    while True:
        alpha, beta = torch.randn(2, 5, generator=dice)
        line = 0.3 * torch.randn(10_000, generator=dice)
        if clean(line, alpha, beta).var() >= 10 * NOISE**2:
            break
    parts = {}
    for part, rows in ROWS.items():
        x = torch.randn(rows, WIDTH, generator=dice)
        labels = clean(x @ weights.T, alpha, beta)
        parts[part] = x, labels + NOISE * torch.randn(rows, TASKS, generator=dice)
    return parts


def clean(line: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Labels without noise of w x."""
    return line + torch.sin(alpha * line.unsqueeze(-1) + beta).sum(-1)


ARMS: dict[str, Callable[[], Towers]] = {
    "shared bottom": lambda: Towers(layer(WIDTH, SHARED), SHARED),
    "MMoE": lambda: gated(WIDTH, UNITS, experts=EXPERTS, private=0),
    "CGC": lambda: gated(WIDTH, UNITS, experts=EXPERTS, private=3),
}


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean squared error over variance, the mean of the tasks."""
    return ((model(x) - y).square().mean(0) / y.var(0)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"steps": options.steps, "batch": BATCH}
    ends: dict[tuple[str, float], list[float]] = {(arm, rho): [] for arm in ARMS for rho in RHO}
    rows = []
    for seed in options.seeds:
        for rho in RHO:
            parts = regressions(rho, seed)
            for arm, make in ARMS.items():
                began, tried = time.process_time(), []
                for rate in RATES:
                    torch.manual_seed(seed)
                    model = trained(make(), *parts["learnt"], nn.functional.mse_loss, **settings, seed=seed, rate=rate)
                    tried.append((error(model, *parts["choice"]), error(model, *parts["held out"]), rate))
                _, end, rate = min(tried)
                ends[arm, rho].append(end)
                rows.append({
                    "hardware": options.hardware, "arm": arm, "rho": rho, "seed": seed, "steps": options.steps,
                    "rate": rate, "parameters": sum(p.numel() for p in model.parameters()), "error": f"{end:.4f}",
                    "cpu_seconds": f"{time.process_time() - began:.0f}",
                })  # fmt: skip
                print(*rows[-1].values(), flush=True)
    rise = {arm: fmean(ends[arm, 0.0]) / fmean(ends[arm, 1.0]) - 1 for arm in ARMS}
    for arm in ARMS:
        means = ", ".join(f"{fmean(ends[arm, rho]):.4f} at {rho}" for rho in RHO)
        print(f"{arm}: {means}; rises by {100 * rise[arm]:.0f} %")
    print("MMoE - shared bottom at 0:", paired(ends["MMoE", 0.0], ends["shared bottom", 0.0]))
    ahead = all(a < b for a, b in zip(ends["MMoE", 0.0], ends["shared bottom", 0.0], strict=True))
    result = "reproduced" if ahead and rise["MMoE"] < rise["shared bottom"] else "failed"
    print(result)
    for row in rows:
        append("multi_gate", row | {"result": result})


if __name__ == "__main__":
    main()
