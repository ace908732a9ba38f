"""Time per optimizer step of a sparse model and its dense baseline, measured alternately: noise slows both alike."""

from __future__ import annotations

import copy
import io
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from moeify.evaluate.objective import NextToken, Objective, Samples
from moeify.evaluate.run import Settings, Stopped, make_trainer, validate
from moeify.progress import with_progress

Clock = Literal["wall-clock", "CPU"]

TURN = 3
"""Steps of one turn: one that is not timed, and two that are."""

STEADY = 0.1
"""Wall-clock time is used if the middle half of the pairs spreads by less than this part of their median."""


@dataclass(frozen=True)
class Cost:
    """Seconds per step of one model, one value per round.

    Attributes:
        wall: wall-clock time.
        cpu: CPU time of all threads of this process; other processes do not count.
    """

    wall: Sequence[float]
    cpu: Sequence[float]

    def on(self, clock: Clock) -> Sequence[float]:
        """The seconds by one of the clocks."""
        return self.wall if clock == "wall-clock" else self.cpu


@dataclass(frozen=True)
class Pace:
    """Costs of a step of both arms, measured in interleaved rounds; a round's two costs are a pair.

    Attributes:
        sparse: of the sparse model.
        dense: of its dense baseline.
        evaluation: wall-clock seconds of one validation of both.
        on_cpu: whether the models ran on the CPU, whose time can be counted.
    """

    sparse: Cost
    dense: Cost
    evaluation: float = 0.0
    on_cpu: bool = True

    @property
    def clock(self) -> Clock:
        """`wall-clock`, or `CPU` where other processes make wall-clock times noisy."""
        if not self.on_cpu or _spread(self._ratios("wall-clock")) <= STEADY:
            return "wall-clock"
        return "CPU" if _spread(self._ratios("CPU")) < _spread(self._ratios("wall-clock")) else "wall-clock"

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of a sparse and of a dense step, by `clock`."""
        return median(self.sparse.on(self.clock)), median(self.dense.on(self.clock))

    @property
    def wall_seconds(self) -> tuple[float, float]:
        """Median seconds of a sparse and of a dense step that one has to wait."""
        return median(self.sparse.wall), median(self.dense.wall)

    @property
    def ratio(self) -> float:
        """Sparse over dense cost of a step, the median of the pairs."""
        return median(self._ratios(self.clock))

    @property
    def ratios(self) -> tuple[float, float]:
        """The first and third quartile of the ratios of the pairs."""
        return _middle(self._ratios(self.clock))

    def _ratios(self, clock: Clock) -> list[float]:
        return [s / d for s, d in zip(self.sparse.on(clock), self.dense.on(clock), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Pace:
        """The inverse of `to_dict`."""
        return cls(**values | {name: Cost(**values[name]) for name in ("sparse", "dense")})


def measure_pace(
    sparse: nn.Module,
    dense: nn.Module,
    train: Samples,
    validation: Samples,
    settings: Settings,
    objective: Objective | None = None,
) -> Pace:
    """Train copies of both models alternately for a few steps, and time these.

    Every round trains one copy and then the other, the first one alternating, on the same tokens, as `train_run` would:
    losses, controllers and optimizer included. The first step of each turn is not timed. The models stay as they are.

    Args:
        sparse: the sparse model.
        dense: its dense baseline.
        train: samples to train on.
        validation: samples whose evaluation is timed once.
        settings: of the runs to come; `settings.pairs` is the number of rounds.
        objective: of the runs to come; by default a language model's.

    Raises:
        Stopped: a signal came.
    """
    objective = NextToken() if objective is None else objective
    copies = {"sparse": copy.deepcopy(sparse), "dense": copy.deepcopy(dense)}
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in copies}
    for turn in with_progress(range(settings.pairs), "measuring what a step costs, turns of both"):
        for name in sorted(copies, reverse=turn % 2 == 0):
            laps[name].append(
                _lap(copies[name], train, replace(settings, steps=TURN, seed=settings.seed + turn), objective)
            )
    started = time.perf_counter()
    for model in copies.values():
        validate(model, validation, settings, objective)
    costs = {name: Cost(*(list(clock) for clock in zip(*pairs, strict=True))) for name, pairs in laps.items()}
    device = next(copies["dense"].parameters()).device
    return Pace(**costs, evaluation=time.perf_counter() - started, on_cpu=device.type == "cpu")


def fit(settings: Settings, pace: Pace) -> Settings:
    """The settings, with fewer steps if a pair of runs would take longer than `settings.minutes`; at least 20.

    The steps that were measured count; a seventh of the time is kept for everything but steps and validation.
    """
    if settings.minutes is None or settings.minutes == math.inf:
        return settings
    seconds = 60 * settings.minutes * 6 / 7 - (settings.evaluations + 2) * pace.evaluation
    steps = max(20, int(seconds / sum(pace.wall_seconds) - TURN * settings.pairs) // 10 * 10)
    if steps >= settings.steps:
        return settings
    return replace(settings, steps=steps, evaluations=min(settings.evaluations, steps))


def _lap(model: nn.Module, train: Samples, settings: Settings, objective: Objective) -> tuple[float, float]:
    """Seconds per step of one turn, by both clocks."""
    watch = _Stopwatch()
    still = replace(settings, sparse=replace(settings.sparse, progress=False))
    quiet = replace(still, extra=still.extra | {"save_strategy": "no", "logging_strategy": "no"})
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        trainer = make_trainer(model, train, Path(folder), quiet, [watch], objective)
        trainer.train()
    if trainer.state.global_step < settings.steps:
        raise Stopped("stopped before the first step")
    timed = watch.laps[1:]
    return sum(wall for wall, _ in timed) / len(timed), sum(cpu for _, cpu in timed) / len(timed)


class _Stopwatch(TrainerCallback):
    """Times every step by both clocks."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wall, cpu = self.started
        self.laps.append((time.perf_counter() - wall, time.process_time() - cpu))


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def _spread(values: Sequence[float]) -> float:
    first, third = _middle(values)
    return (third - first) / median(values)
