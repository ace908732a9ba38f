"""A sparse model against its dense baseline: at equal tokens, at equal training FLOPs and at equal time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, get_args

import torch
from torch import nn

from moeify.evaluate.objective import NextToken, Objective, Samples, Units
from moeify.evaluate.pace import Pace, fit, measure_pace
from moeify.evaluate.run import Run, Settings, train_run
from moeify.files import read_json, write_json
from moeify.flops import count
from moeify.folders import RUN_LOCK, locked
from moeify.sparsify import Recipe
from moeify.sparsify.convert import convert
from moeify.sparsify.report import Report
from moeify.store import load_weights
from moeify.store.hashes import saving
from moeify.store.weights import write_weights
from moeify.train.checkpoint.folder import checkpoints, recover
from moeify.train.freeze import freeze

Axis = Literal["tokens", "flops", "seconds"]


@dataclass(frozen=True)
class Difference:
    """Sparse minus dense validation loss when both have spent the same.

    Attributes:
        axis: what is equal.
        sparse: mean loss of the sparse runs, of a language model in nats per token.
        dense: mean loss of the dense runs.
        difference: mean of the differences, seed by seed; negative where the sparse model is better.
        spread: standard deviation of the differences over seeds, None for a single seed.
        seeds: number of seeds.
        between: the differences at the first and the third quartile of the measured cost of a sparse step relative
            to a dense one; equal to `difference` twice on axes without a measured cost.
    """

    axis: Axis
    sparse: float
    dense: float
    difference: float
    spread: float | None
    seeds: int
    between: tuple[float, float]

    @property
    def is_clear(self) -> bool:
        """Whether the sign of the difference is clear of noise, of the seeds and of the cost of a step."""
        beyond_seeds = self.spread is None or abs(self.difference) > self.spread
        return beyond_seeds and min(self.between) * max(self.between) > 0


@dataclass(frozen=True)
class Versus:
    """Runs of a sparse model and of its dense baseline, with the same seeds in the same order.

    Attributes:
        sparse: the sparse runs.
        dense: the dense runs.
        pace: the cost of a step of both, measured alternately; None uses the seconds of the runs themselves.
        units: what a report calls the tokens and the loss.
    """

    sparse: list[Run]
    dense: list[Run]
    pace: Pace | None = None
    units: Units = field(default_factory=Units)

    def at_equal(self, axis: Axis) -> Difference:
        """Compare where the one that spent less has ended; the other's loss there is interpolated on its curve."""
        pairs = self._pairs(axis)
        differences = [sparse - dense for sparse, dense in pairs]
        difference = fmean(differences)
        between = (difference, difference)
        if axis == "seconds" and self.pace is not None:
            less, more = (
                fmean(sparse - dense for sparse, dense in self._pairs(axis, ratio / self.pace.ratio))
                for ratio in self.pace.ratios
            )
            between = (less, more)
        return Difference(
            axis=axis,
            sparse=fmean(sparse for sparse, _ in pairs),
            dense=fmean(dense for _, dense in pairs),
            difference=difference,
            spread=stdev(differences) if len(differences) > 1 else None,
            seeds=len(pairs),
            between=between,
        )

    def _pairs(self, axis: Axis, dearer: float = 1.0) -> list[tuple[float, float]]:
        """The losses of both at equal cost, seed by seed, if a sparse step took `dearer` times as long as measured."""
        pairs = []
        for sparse, dense in zip(*self.curves(dearer), strict=True):
            budget = min(getattr(run.points[-1], axis) for run in (sparse, dense))
            pairs.append((loss_at(sparse, axis, budget), loss_at(dense, axis, budget)))
        return pairs

    def curves(self, dearer: float = 1.0) -> tuple[list[Run], list[Run]]:
        """The runs, sparse and dense, with seconds by the measured pace.

        Args:
            dearer: multiplies the seconds of the sparse runs.
        """
        if self.pace is None:
            return self.sparse, self.dense
        sparse, dense = self.pace.seconds
        return [_paced(run, sparse * dearer) for run in self.sparse], [_paced(run, dense) for run in self.dense]

    @property
    def steps(self) -> int:
        """Optimizer steps of every run."""
        return self.sparse[0].points[-1].step

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Training speed of the sparse and of the dense model, by the measured pace."""
        sparse, dense = self.curves()
        return sparse[0].tokens_per_second, dense[0].tokens_per_second

    @property
    def differences(self) -> list[Difference]:
        """The comparison on every axis."""
        return [self.at_equal(axis) for axis in get_args(Axis)]

    @property
    def scores(self) -> dict[str, tuple[float, float]]:
        """The scores at the end, sparse and dense, means over seeds."""
        return {
            name: (fmean(run.scores[name] for run in self.sparse), fmean(run.scores[name] for run in self.dense))
            for name in self.sparse[0].scores
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "scores": {name: {"sparse": sparse, "dense": dense} for name, (sparse, dense) in self.scores.items()},
            "at_equal": {
                d.axis: {k: v for k, v in vars(d).items() if k != "axis"} | {"is_clear": d.is_clear}
                for d in self.differences
            },
            "pace": None if self.pace is None else self.pace.to_dict() | {"clock": self.pace.clock},
            "runs": [
                {"tokens_per_second": run.tokens_per_second, **run.to_dict()} for run in (*self.sparse, *self.dense)
            ],
        }


def _paced(run: Run, seconds: float) -> Run:
    return replace(run, points=[replace(point, seconds=point.step * seconds) for point in run.points])


def loss_at(run: Run, axis: Axis, budget: float) -> float:
    """The validation loss when a run had spent `budget`, linear between measured points.

    Raises:
        ValueError: the run's first point is beyond the budget.
    """
    spent = [getattr(point, axis) for point in run.points]
    if budget < spent[0]:
        raise ValueError(
            f"the first validation loss of the {run.name} run was measured after {spent[0]:.3g} {axis}, but the other "
            f"run ended at {budget:.3g}; measure more often (more evaluations)"
        )
    for before, after in zip(run.points, run.points[1:], strict=False):
        start, end = getattr(before, axis), getattr(after, axis)
        if start <= budget <= end:
            share = (budget - start) / (end - start)
            return (1 - share) * before.loss + share * after.loss
    return run.points[-1].loss


def versus(
    build: Callable[[], nn.Module],
    recipe: Recipe,
    train: Samples,
    validation: Samples,
    folder: Path,
    settings: Settings,
    *,
    objective: Objective | None = None,
    probe: Any = None,
    seeds: int = 1,
    resume: bool = False,
    log: Callable[[str], None] = print,
    on_model: Callable[[str, nn.Module], None] = lambda name, model: None,
) -> Versus:
    """Train a sparse model and its dense baseline on the same samples in the same order, from the same initialisation.

    Shared parameters start with the same values, sparse layers as the recipe defines. Before the first run, the cost of
    a step of either model is measured alternately, see `moeify.evaluate.pace`.

    Args:
        build: makes the dense model; it is called under the seed of each pair.
        recipe: makes a copy of it sparse.
        train: samples to train on.
        validation: samples to evaluate on.
        folder: the runs' folders and results go here; a finished run found there is not repeated when resuming.
        settings: how long and how fast.
        objective: how batches are made and answers judged; by default those of a language model.
        probe: an input to verify the sparse model with, as of `sparsify`; by default one is guessed.
        seeds: number of pairs, with the seeds `settings.seed`, `settings.seed + 1`, ...
        resume: continue where a stopped call ended.
        log: receives a line before every run.
        on_model: receives every trained model with its name, `sparse` or `dense`.

    Raises:
        moeify.evaluate.run.Stopped: a signal ended a run before its last step; call again with `resume=True`.
    """
    objective = NextToken() if objective is None else objective
    work = _Work(train, validation, objective)
    arms: dict[str, list[Run]] = {"sparse": [], "dense": []}
    pace: Pace | None = None
    for seed in range(settings.seed, settings.seed + seeds):
        torch.manual_seed(seed)
        dense = build()
        sparse = copy.deepcopy(dense)
        report = convert(sparse, recipe, probe=probe)
        if settings.freeze:
            freeze(sparse, *settings.freeze, verbose=seed == settings.seed)
        if seed == settings.seed:
            _show(report, sparse, dense, work)
            pace = _pace(sparse, dense, work, folder, settings, resume=resume, log=log)
            settings = settings if pace is None else _fitted(settings, pace, log)
        for name, model in (("sparse", sparse), ("dense", dense)):
            place = folder / f"{name}-{seed}"
            if resume and (place / "run.json").is_file():
                run = _result(place / "run.json", Run.from_dict)
                load_weights(model, place)
            else:
                log(f"training the {name} model, seed {seed}")
                run = _trained(name, model, work, place, replace(settings, seed=seed), resume=resume)
            arms[name].append(run)
            on_model(name, model)
    return Versus(**arms, pace=pace, units=objective.units)


@dataclass(frozen=True)
class _Work:
    """What both models are trained on, and for."""

    train: Samples
    validation: Samples
    objective: Objective


def _show(report: Report, sparse: nn.Module, dense: nn.Module, work: _Work) -> None:
    """Print what was made sparse, with the FLOPs at the length of the samples."""
    length = work.train.length
    replace(report, before=count(dense, length), after=count(sparse, length)).show(piece=work.objective.units.piece)


def _trained(name: str, model: nn.Module, work: _Work, place: Path, settings: Settings, *, resume: bool) -> Run:
    """Train one model of a pair in its folder, and save its weights and its curve there."""
    with locked(place, RUN_LOCK, "is training"):
        recover(place)
    begun = resume and bool(checkpoints(place))
    run = train_run(
        name, model, work.train, work.validation, place, settings, objective=work.objective, resume=begun
    )  # fmt: skip
    with saving(place) as stage:
        write_weights(model.state_dict(), stage.new)
    write_json(place / "run.json", run.to_dict(), indent=None)
    return run


def _fitted(settings: Settings, pace: Pace, log: Callable[[str], None]) -> Settings:
    """The settings with as many steps as fit, and a line about the change."""
    fitted = fit(settings, pace)
    if fitted.steps < settings.steps:
        log(
            f"{settings.steps} steps of both would take longer than {settings.minutes:g} minutes on this machine; "
            f"{fitted.steps} are taken (--steps without --minutes takes all)"
        )
    return fitted


def _result(file: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What an earlier call has written."""
    try:
        return read(read_json(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); delete it, and the run is repeated") from None


def _pace(
    sparse: nn.Module, dense: nn.Module, work: _Work, folder: Path, settings: Settings,
    *, resume: bool, log: Callable[[str], None],
) -> Pace | None:  # fmt: skip
    """The pace of both, measured or read, if requested."""
    file = folder / "pace.json"
    if not settings.pairs:
        return None
    if resume and file.is_file():
        return _result(file, Pace.from_dict)
    log(f"measuring what a step costs both models, by turns, {settings.pairs} times")
    pace = measure_pace(sparse, dense, work.train, work.validation, settings, work.objective)
    write_json(file, pace.to_dict())
    log(
        f"a sparse step takes {pace.wall_seconds[0]:.3f} s, a dense one {pace.wall_seconds[1]:.3f} s; by {pace.clock} "
        f"time a sparse one costs {pace.ratio:.2f} times as much ({pace.ratios[0]:.2f} to {pace.ratios[1]:.2f})"
    )
    return pace
