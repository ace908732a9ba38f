"""The learning rate of every arm of a claim, chosen by a seed and by data that are not reported.

`python claims/NAME.py --tune` tries 1, 2 and 4 times the claim's own rate for every arm and, if one is best at an end,
one rate beyond that end for all of them, so that all have the same budget. Every try is a row of
`claims/results/rates.csv`; a run without `--rate` reads there what was chosen last, and trains nothing to choose.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from results import RESULTS, append
from torch import Tensor

GRID, BEYOND = (1.0, 2.0, 4.0), 2.0
UNREPORTED = 100
"""The seed of all tries."""
TRACKED = Path(__file__).parents[1] / "results"
Arm = TypeVar("Arm", bound=Hashable)


def add_rates(parser: argparse.ArgumentParser, around: float) -> None:
    """Options to give one rate to all arms, and to choose one for each around that of the claim."""
    parser.add_argument("--rate", type=float, help=f"of all arms, by default what was tuned for each, else {around:g}")
    parser.add_argument("--tune", action="store_true", help="choose the rate of every arm, and end")
    parser.set_defaults(around=around)


def rates_of(
    claim: str,
    arms: Iterable[Arm],
    chosen: argparse.Namespace,
    error: Callable[[Arm, float], float],
    *,
    corpus: str = "",
) -> dict[Arm, float]:
    """The rate of every arm: that of the command line, that which was tuned, or the claim's own.

    Args:
        claim: whose arms they are.
        arms: all of them.
        chosen: the command line, with what `add_rates` adds, `steps` and `hardware`.
        error: what an arm reaches at a rate on data that are not reported, from the seed `UNREPORTED`; low is good.
        corpus: the hash of the text, where it differs between environments.

    Raises:
        SystemExit: the rates have been tuned, as was asked for.
        ValueError: others were tuned than these arms.
    """
    arms = list(arms)
    if chosen.tune:
        _tune(claim, arms, chosen, error, corpus)
        raise SystemExit
    if chosen.rate is not None:
        return dict.fromkeys(arms, chosen.rate)
    tuned = _tuned(claim)
    if tuned and (missing := [str(arm) for arm in arms if str(arm) not in tuned]):
        raise ValueError(f"no rate was tuned for {', '.join(missing)}: python claims/{claim}.py --tune")
    return {arm: tuned.get(str(arm), chosen.around) for arm in arms}


def parted(number: int, parts: int = 10) -> tuple[Tensor, Tensor]:
    """Which of so many samples are held out to choose rates by, one of the parts at random, and the others."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    return order[: number // parts], order[number // parts :]


def _tuned(claim: str) -> dict[str, float]:
    for file in (RESULTS / "rates.csv", TRACKED / "rates.csv"):
        if file.is_file():
            with file.open(newline="") as lines:
                rows = [row for row in csv.DictReader(lines) if (row["claim"], row["chosen"]) == (claim, "True")]
            if rows:
                return {row["arm"]: float(row["rate"]) for row in rows}
    return {}


def _tune(
    claim: str, arms: list[Arm], chosen: argparse.Namespace, error: Callable[[Arm, float], float], corpus: str
) -> None:
    found: dict[Arm, dict[float, float]] = {arm: {} for arm in arms}
    seconds: dict[tuple[Arm, float], float] = {}

    def attempt(rate: float) -> None:
        for arm in arms:
            began, value = time.process_time(), error(arm, rate)
            found[arm][rate] = value if math.isfinite(value) else math.inf
            seconds[arm, rate] = time.process_time() - began
            print(f"{arm} at {rate:g}: {value:.4f}", flush=True)

    rates = [factor * chosen.around for factor in GRID]
    for rate in rates:
        attempt(rate)
    first = {min(errors, key=errors.__getitem__) for errors in found.values()}
    for end, beyond in ((rates[0], rates[0] / BEYOND), (rates[-1], rates[-1] * BEYOND)):
        if end in first:
            attempt(beyond)
    for arm, errors in found.items():
        best = min(errors, key=errors.__getitem__)
        for rate, value in sorted(errors.items()):
            append("rates", {
                "hardware": chosen.hardware, "claim": claim, "arm": arm, "seed": UNREPORTED, "steps": chosen.steps,
                "corpus": corpus, "rate": rate, "error": f"{value:.4f}", "chosen": rate == best,
                "cpu_seconds": f"{seconds[arm, rate]:.0f}",
            })  # fmt: skip
        print(f"{arm}: {best:g}")
