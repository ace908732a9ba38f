"""Every layout that a model, a cluster and a program allow, by the time of a step; and what binds the fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moeify.parallel.cluster import Cluster
from moeify.parallel.cost import COMPUTE, Cost, Step
from moeify.parallel.layout import TARGETS, Layout, Target, layouts
from moeify.parallel.shape import ModelShape
from moeify.parallel.workload import Workload
from moeify.progress import with_progress

USABLE = 0.94
"""Part of a device's memory that a step can use; the rest is of the driver, of NCCL and lost to fragments."""

WALLS = {
    "compute": (*COMPUTE, "optimizer"),
    "network": ("exchange", "tensor", "weights", "messages"),
    "one hot expert": ("skew",),
    "waiting for stages": ("bubble",),
    "fixed costs": ("fixed",),
}
"""What can bind a step, and the kinds of time that it explains."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout and its cost."""

    layout: Layout
    cost: Cost

    @property
    def walls(self) -> dict[str, float]:
        """The share of the step that each wall takes, the largest first."""
        shares = {wall: sum(self.cost.seconds[kind] for kind in kinds) for wall, kinds in WALLS.items()}
        return dict(sorted(((w, s / self.cost.step) for w, s in shares.items()), key=lambda item: -item[1]))

    def __str__(self) -> str:
        return (
            f"{self.layout}: {1000 * self.cost.step:,.1f} ms a step, {self.cost.tokens_per_second:,.0f} tokens/s, "
            f"{self.cost.memory / 1e9:.1f} GB"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layouts by the time of a step.

    Attributes:
        step: what was priced.
        choices: layouts that fit into memory, the fastest first.
        too_large: those that do not, the fastest first.
    """

    step: Step
    choices: tuple[Choice, ...]
    too_large: tuple[Choice, ...]

    @property
    def best(self) -> Choice:
        """The fastest layout that fits.

        Raises:
            ValueError: none fits; the message says what the smallest needs.
        """
        if not self.choices:
            least = min(self.too_large, key=lambda choice: choice.cost.memory)
            raise ValueError(
                f"{self.step.shape.name} fits no layout of {self.step.cluster.size} devices of "
                f"{self.step.cluster.device.memory / 1e9:.0f} GB: {least.layout} needs "
                f"{least.cost.memory / 1e9:.1f} GB; add devices, or take shorter sequences"
            )
        return self.choices[0]

    @property
    def wall(self) -> str:
        """What binds the best layout: memory, if a faster one does not fit; else what takes most of its step."""
        if self.too_large and self.too_large[0].cost.step < 0.98 * self.best.cost.step:
            return "memory"
        return next(iter(self.best.walls))

    def explain(self) -> str:
        """The best layout, what binds it, the runner-up and why it is slower, and what memory rules out."""
        best = self.best
        shares = ", ".join(f"{wall} {100 * share:.0f} %" for wall, share in best.walls.items() if share >= 0.005)
        has = f"{self.step.cluster.device.memory / 1e9:.0f} GB"
        lines = [f"best: {best} of {has}", f"bound by {self.wall}; its step: {shares}"]
        if (hottest := self.step.workload.hottest) > 1.05:
            lines.append(
                f"the fullest expert of a layer gets {hottest:.1f} times the mean, which costs "
                f"{100 * best.cost.seconds['skew'] / best.cost.step:.0f} % of the step"
            )
        if (second := self._runner_up()) is not None:
            slower = {w: second.walls[w] * second.cost.step - best.walls[w] * best.cost.step for w in WALLS}
            most = max(slower, key=slower.__getitem__)
            lines.append(
                f"runner-up: {second}; {100 * (second.cost.step / best.cost.step - 1):.1f} % slower, "
                f"most of it by {most} (+{1000 * slower[most]:,.1f} ms)"
            )
        if self.wall == "memory":
            first = self.too_large[0]
            less = 100 * (1 - first.cost.step / best.cost.step)
            lines.append(
                f"memory rules out {first.layout}, which would take {less:.0f} % less time, but "
                f"{first.cost.memory / 1e9:.1f} GB"
            )
        return "\n".join(lines)

    def rows(self, count: int = 10) -> list[dict[str, Any]]:
        """The first layouts as rows of a table, each with its speed, its memory and the share of each wall."""
        return [
            {
                "layout": str(choice.layout), "ms": 1000 * choice.cost.step, "tokens/s": choice.cost.tokens_per_second,
                "GB": choice.cost.memory / 1e9, **choice.walls,
            }
            for choice in self.choices[:count]
        ]  # fmt: skip

    def _runner_up(self) -> Choice | None:
        """The fastest layout that differs in a degree, not in how its sequences are divided alone."""
        best = self.best.layout.degrees
        return next((choice for choice in self.choices if choice.layout.degrees != best), None)


def plan(
    model: nn.Module | ModelShape | Any, cluster: Cluster, workload: Workload | None = None, *,
    length: int, sequences: int, target: str | Target = "transformers",
) -> Plan:  # fmt: skip
    """Rank every layout of a sparse model on a cluster by the predicted time of a training step.

    The optimizer is AdamW, computed in bf16 with fp32 states.

    Args:
        model: a sparse model, ours or of transformers; a configuration of transformers; or a shape.
        cluster: all of its devices take part.
        workload: how rows are spread over experts; balanced by default. One of another number of experts is stretched.
        length: tokens of a sequence.
        sequences: of one step, over all devices.
        target: the program, by name or as an object.

    Raises:
        ValueError: no such program; a model without experts; no layout is possible.
    """
    if isinstance(target, str):
        if target not in TARGETS:
            raise ValueError(f"no layouts of {target!r} are known, only of {', '.join(TARGETS)}")
        target = TARGETS[target]
    if isinstance(model, ModelShape):
        shape = model
    else:
        shape = ModelShape.of(model) if isinstance(model, nn.Module) else ModelShape.of_config(model)
    workload = Workload.balanced(shape.num_experts) if workload is None else workload.stretched(shape.num_experts)
    step = Step(shape=shape, cluster=cluster, workload=workload, length=length, target=target)
    found = list(layouts(shape, cluster, target, sequences))
    if not found:
        raise ValueError(
            f"{target.name} has no layout of {cluster.size} devices for {sequences} sequences a step; "
            "take a multiple of the number of devices"
        )
    choices = [Choice(layout=layout, cost=step.price(layout)) for layout in with_progress(found, "layouts")]
    choices.sort(key=lambda choice: choice.cost.step)
    fits = [choice.cost.memory <= USABLE * cluster.device.memory for choice in choices]
    return Plan(
        step=step, choices=tuple(c for c, fit in zip(choices, fits, strict=True) if fit),
        too_large=tuple(c for c, fit in zip(choices, fits, strict=True) if not fit),
    )  # fmt: skip
