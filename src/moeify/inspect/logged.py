"""Diagnose a training by its log: the faults that losses, gradient norms and loads over time can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moeify.files import read_json
from moeify.inspect.faults.bias_unmoved import never_moved
from moeify.inspect.faults.capacity_drops import dropped
from moeify.inspect.faults.collapse import Collapsed
from moeify.inspect.faults.dead_experts import dead
from moeify.inspect.faults.finding import Finding, NotGiven, Unknown
from moeify.inspect.faults.not_finite import FIX
from moeify.inspect.faults.observed import ROWS
from moeify.statistics import DEAD, load

Entry = Mapping[str, Any]
STATE = "trainer_state.json"
ROUTER_GRADIENT = "router_grad_norm"
"""An entry of this name, which a training loop may log, is the gradient norm of its routers."""


@dataclass(frozen=True)
class Window:
    """The last tenth of a log's entries about one layer, or about all layers together.

    Attributes:
        layer: its name; empty for means over all layers, which `trainer_state.json` has.
        entries: the figures, oldest first.
        since: the step since which half its experts or fewer are in use; None if they are not now.
    """

    layer: str
    entries: Sequence[Entry]
    since: int | None

    @property
    def rows(self) -> torch.Tensor | None:
        """The rows of every expert, if they were logged."""
        found = [entry["rows"] for entry in self.entries if entry.get("rows")]
        return torch.tensor(found).sum(0) if found else None

    def mean(self, name: str) -> float | None:
        """The mean of a figure; None if it was not logged."""
        found = [float(entry[name]) for entry in self.entries if entry.get(name) is not None]
        return sum(found) / len(found) if found else None


class TrainingLog:
    """The entries of a training's log, oldest first.

    Args:
        entries: of `metrics.jsonl`, or the `log_history` of a `trainer_state.json`.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = [entry for entry in entries if "loss" in entry or "eval_loss" in entry]

    def values(self, name: str) -> list[tuple[int, float]]:
        """Step and value of every entry that has a figure."""
        return [(entry.get("step", 0), float(entry[name])) for entry in self.entries if entry.get(name) is not None]

    @cached_property
    def windows(self) -> list[Window]:
        """The end of the log, layer by layer.

        Raises:
            Unknown: the log has no figures of experts.
        """
        of_layers: dict[str, list[tuple[int, Entry]]] = {}
        for entry in self.entries:
            layers = entry.get("layers") or ({"": entry} if "effective_experts" in entry else {})
            for name, figures in layers.items():
                of_layers.setdefault(name, []).append((entry.get("step", 0), figures))
        if not of_layers:
            raise Unknown("the log has no figures of experts; train with SparseTrainer, or with RoutingCallback")
        return [_window(name, found) for name, found in of_layers.items()]


def _window(name: str, found: Sequence[tuple[int, Entry]]) -> Window:
    since = None
    for step, figures in reversed(found):
        if not (ratio := _in_use(figures)) or ratio > 0.5:
            break
        since = step
    return Window(name, [figures for _, figures in found[-max(3, len(found) // 10) :]], since)


def _in_use(figures: Entry) -> float | None:
    """Experts in use over all: 1 / (E Σ f²) of the rows, else exp(H) / E, which is never smaller."""
    if rows := figures.get("rows"):
        return 1 / (len(rows) * float(load(torch.tensor(rows)).square().sum())) if sum(rows) else None
    return figures.get("effective_experts")


def read_log(run: Path) -> TrainingLog:
    """The log of a run: of its newest training `metrics.jsonl`, else `trainer_state.json`.

    Args:
        run: the folder of `moeify train`, the `output_dir` of a trainer, a checkpoint, or one of these files.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: it cannot be read, or has no entries.
    """
    from moeify.train.run_log import LOG, entries

    found = [run] if run.is_file() else [*_newest(run, f"sparse-*/{LOG}", LOG, STATE, f"checkpoint-*/{STATE}")]
    if not found:
        raise FileNotFoundError(f"{run} has no training log: neither {LOG} nor {STATE} is in it or its checkpoints")
    lines = read_json(found[0]).get("log_history", []) if found[0].suffix == ".json" else list(entries(found[0]))
    log = TrainingLog(lines)
    if not log.entries:
        raise ValueError(f"{found[0]} has no entry with a loss")
    return log


def _newest(run: Path, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(run.glob(pattern), key=lambda file: file.stat().st_mtime, reverse=True)


def not_finite(log: TrainingLog) -> Iterator[Finding]:
    """A loss is NaN or infinite, or the last two gradient norms are; a single one is what a loss scaler looks for.

    transformers logs a loss of NaN as that of the step before (`logging_nan_inf_filter`), so gradients tell more.
    """
    losses = [(step, value) for step, value in log.values("loss") if not math.isfinite(value)]
    norms = [(step, value) for step, value in log.values("grad_norm")[-2:] if not math.isfinite(value)]
    if losses or len(norms) == 2:
        step, value = (losses or norms)[0]
        yield Finding(
            cause="the training is no longer finite",
            evidence=f"the {'loss' if losses else 'gradient norm'} is {value} at step {step}",
            fix=FIX,
        )


def scaled_loss(log: TrainingLog) -> Iterator[Finding]:
    """The training loss is 2, 3, ... times the validation loss: micro-batches are summed, not averaged.

    A model that has not seen the training data twice has about the same loss on both. The median ratio of two
    evaluations or more must be within a tenth of a whole number, and 1.9 or more.
    """
    losses, ratios = log.values("loss"), []
    for step, value in log.values("eval_loss"):
        near = [(abs(at - step), loss) for at, loss in losses if math.isfinite(loss)]
        ratios += [min(near)[1] / value] if near and math.isfinite(value) and value > 0 else []
    if len(ratios) < 2:
        raise NotGiven("the log has no two validation losses to compare the training loss with")
    middle = sorted(ratios)[len(ratios) // 2]
    if middle >= 1.9 and abs(middle - round(middle)) <= 0.1:
        yield Finding(
            cause="the training loss is summed over micro-batches instead of averaged",
            evidence=f"it is {middle:.2f} times the validation loss, the median over {len(ratios)} evaluations",
            fix="divide the loss by gradient_accumulation_steps, or by num_items_in_batch as the Trainer passes it; "
            "the gradient, and with it the clipping, is too large by the same factor",
        )


def detached_router(log: TrainingLog) -> Iterator[Finding]:
    """The gradient norm of the routers is 0 in every entry."""
    norms = log.values(ROUTER_GRADIENT)
    if not norms:
        raise NotGiven(f"the log has no {ROUTER_GRADIENT}; moeify doctor --model measures the gradient")
    if not any(value for _, value in norms):
        yield Finding(
            cause="the loss does not reach the router",
            evidence=f"the gradient norm of the routers is 0 in all {len(norms)} entries, to step {norms[-1][0]}",
            fix="look for detach(), no_grad() or .data between router and experts, frozen routers, and k=1 with "
            "renormalised weights",
        )


def bias_unmoved(log: TrainingLog) -> Iterator[Finding]:
    """The selection biases of a layer are equal in every entry: no controller moves them (arXiv 2408.15664)."""
    ranges: dict[str, list[float]] = {}
    for entry in log.entries:
        for name, figures in (entry.get("layers") or {}).items():
            if "bias_range" in figures:
                ranges.setdefault(name, []).append(float(figures["bias_range"]))
    if not ranges:
        raise NotGiven("the log has no selection bias; moeify doctor --model reads that of the model")
    if len(next(iter(ranges.values()))) < 3:
        raise Unknown("too little data: the log has fewer than three entries with selection biases")
    for name, found in ranges.items():
        if not any(found):
            yield never_moved(name, f"largest and smallest bias are equal in all {len(found)} entries")


def capacity_drops(log: TrainingLog) -> Iterator[Finding]:
    """At the end a capacity drops more than 1 % of the rows (Switch, section 2.2)."""
    for window in log.windows:
        if (share := window.mean("drop_rate")) is not None and share > 0.01:
            yield dropped(
                window.layer, f"{share:.1%} of the rows are dropped in the last {len(window.entries)} entries"
            )


def blind_collapse(log: TrainingLog) -> Iterator[Finding]:
    """At the end half the experts or fewer are in use, and the balance loss shows less than a tenth of it."""
    for found, window in _collapsed(log):
        if found.balance is None:
            raise Unknown("the log has no balance loss")
        if found.is_hidden:
            yield found.finding(f", since step {window.since}")


def collapse(log: TrainingLog) -> Iterator[Finding]:
    """At the end half the experts or fewer are in use, and the balance loss, where it is logged, shows it."""
    for found, window in _collapsed(log):
        if not found.is_hidden:
            yield found.finding(f", since step {window.since}")


def _collapsed(log: TrainingLog) -> Iterator[tuple[Collapsed, Window]]:
    for window in log.windows:
        rows = _enough(window)
        share = window.mean("effective_experts") if rows is None else _in_use({"rows": rows.tolist()})
        if share is not None and share <= 0.5 and window.since is not None:
            experts = None if rows is None else len(rows)
            yield Collapsed(window.layer, experts, share, window.mean("balance")), window


def dead_experts(log: TrainingLog) -> Iterator[Finding]:
    """At the end an expert gets less than 1 % of an even share of the rows."""
    for window in log.windows:
        if (rows := _enough(window)) is not None:
            if bool((load(rows) * len(rows) < DEAD).any()):
                yield dead(window.layer, rows)
        elif all(entry.get("dead_experts_worst", entry.get("dead_experts", 0)) >= 1 for entry in window.entries):
            most = window.mean("dead_experts_worst") or window.mean("dead_experts")
            yield Finding(
                cause="experts are dead",
                evidence=f"{most:.1f} in the worst layer, in each of the last {len(window.entries)} entries",
                fix="balance (SparseArguments(balance=1e-2), or a controller that moves a selection bias)",
            )


def _enough(window: Window) -> torch.Tensor | None:
    """The rows of every expert, if they were logged.

    Raises:
        Unknown: too few of them, or too few entries.
    """
    rows = window.rows
    if rows is None and len(window.entries) < 3:
        raise Unknown("too little data: the log has fewer than three entries with figures of experts")
    if rows is not None and int(rows.sum()) < ROWS * len(rows):
        raise Unknown(
            f"too little data: the last entries have {int(rows.sum()) / len(rows):.0f} rows per expert of "
            f"{window.layer}, and it takes {ROWS} to tell a dead expert from a rare one"
        )
    return rows


LOG_FAULTS: dict[str, Callable[[TrainingLog], Iterator[Finding]]] = {
    fault.__name__: fault
    for fault in (
        not_finite,
        scaled_loss,
        detached_router,
        bias_unmoved,
        capacity_drops,
        blind_collapse,
        collapse,
        dead_experts,
    )
}
"""The faults that a log can show, by name; causes before consequences."""
