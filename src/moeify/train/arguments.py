"""`SparseArguments`: the training options of sparse models, beside `transformers.TrainingArguments`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from moeify.balance import Rule, SparsityTarget
from moeify.routing import Routing
from moeify.schedule import Schedule

Scope = Literal["global", "batch", "sequence"]
Loss = Callable[[Routing], Tensor]


@dataclass(frozen=True, kw_only=True)
class SparseArguments:
    """How experts are kept balanced, and how the run is shown.

    Attributes:
        balance: weight of the balance loss E · Σ_j f_j · P_j, or its schedule over optimizer steps; 0 turns it off.
        scope: over what f_j is measured. `global`: all micro-batches and ranks of the previous optimizer step.
            `sequence`: each sequence by itself. `batch`: each micro-batch by itself, whose gradient then depends on
            how the step is cut into micro-batches.
        z: weight of the z-loss, or its schedule; 0 turns it off.
        losses: further losses of a decision, each with its weight, a schedule or a `moeify.balance.SparsityTarget`:
            `[(1e-3, distillation), (SparsityTarget(k=2), partial(l1, k=2))]`. Averaged over layers, and over
            micro-batches and ranks by their tokens.
        controller: a rule of `moeify.balance` that moves the routers' selection biases after every step.
        dropout: the expert dropout, or its schedule; None leaves the experts as they are.
        background_save: write checkpoints while training goes on, from a copy in the memory of the CPU; the next one
            waits until that is done. Each rank writes a part of them, as for models that are sharded.
        progress: show one line of progress in a terminal, and a few lines elsewhere, in the place of the Trainer's bar.

    Raises:
        ValueError: a negative weight, or an unknown scope.
    """

    balance: float | Schedule = 1e-2
    scope: Scope = "global"
    z: float | Schedule = 0.0
    losses: Sequence[tuple[float | Schedule, Loss]] = ()
    controller: Rule | None = None
    dropout: float | Schedule | None = None
    background_save: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("balance", "z"):
            weight = getattr(self, name)
            if not callable(weight) and weight < 0:
                raise ValueError(f"{name}={weight} would reward imbalance; weights of losses are at least 0")
        others = [(_name(loss), weight) for weight, loss in self.losses]
        for name, weight in [("balance", self.balance), ("z", self.z), *others]:
            if isinstance(weight, int | float) and not math.isfinite(weight):
                raise ValueError(f"{name}={weight} is no weight of a loss; choose a finite number")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope={self.scope!r} is not known; choose from {', '.join(get_args(Scope))}")

    @property
    def watches(self) -> bool:
        """Whether a balancing loss or a controller needs the routers' decisions."""
        return self.balance != 0 or self.z != 0 or bool(self.losses) or self.controller is not None

    @property
    def targets(self) -> list[SparsityTarget]:
        """The loss weights that adapt to the routing."""
        return [weight for weight, _ in self.losses if isinstance(weight, SparsityTarget)]

    def describe(self) -> str:
        """One line that names the balancing losses and the controller."""
        parts = []
        if self.balance != 0:
            parts.append(f"balance loss (weight {_show(self.balance)}, {self.scope} scope)")
        if self.z != 0:
            parts.append(f"z-loss (weight {_show(self.z)})")
        for weight, loss in self.losses:
            parts.append(f"{_name(loss)} (weight {_show(weight)})")
        if self.controller is not None:
            parts.append(f"controller {self.controller}")
        return "balance: " + (" + ".join(parts) or "none, no loss and no controller")


def at(value: float | Schedule, step: int) -> float:
    """The value of a constant or a schedule at a step."""
    return value(step) if callable(value) else value


def _show(value: float | Schedule) -> str:
    return "scheduled" if callable(value) else f"{value:g}"


def _name(loss: Loss) -> str:
    function = loss.func if isinstance(loss, partial) else loss
    return getattr(function, "__name__", type(function).__name__)
