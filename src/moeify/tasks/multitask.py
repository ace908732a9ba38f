"""The task `multitask`: several columns of a table are predicted at once, from all others, by MMoE, CGC or PLE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.data.fields import Columns
from moeify.data.records import read_records
from moeify.data.synthetic import two_tasks
from moeify.data.tables import Schema, Table, Target
from moeify.evaluate.objective import Batch, Judged, Objective, Units
from moeify.evaluate.run import on_device
from moeify.files import write_json
from moeify.find.where import modules
from moeify.models import MultiTask
from moeify.registry import suggest
from moeify.routers import MultiGate
from moeify.sparsify.narrow import extraction_of_streams, narrow, narrow_of_streams
from moeify.sparsify.recipe import Recipe
from moeify.tasks.base import Setup, Task
from moeify.tasks.rows import Row

TRAIN, HELD_OUT = 8000, 2000
"""Synthetic rows in either part."""

AT_ONCE, SHOWN = 1024, 6
"""Rows that are judged at once at the end, and those that the report shows."""

LEVELS = modules(r"^levels\.\d+$")


@dataclass(frozen=True, kw_only=True)
class ManyTasks(Task):
    """Tables with a named column per task; without data, synthetic rows with two correlated tasks.

    Attributes:
        columns: the columns to predict, separated by commas: `income,marital_status=Never-married`.
        leave_out: columns that are no inputs, separated by commas.
        method: `mmoe`, `cgc` or `ple`.
        private: experts that each task has for itself, with cgc and ple.
        levels: levels of experts; mmoe and cgc have one.
        validation: a file or folder of held-out rows; without it, those that the data hold out, or a tenth.
    """

    name: ClassVar[str] = "multitask"
    columns: str | None = None
    leave_out: str = ""
    method: str = "mmoe"
    private: int = 1
    levels: int = 2
    validation: str | None = None

    def recipe(self, num_experts: int | None) -> Recipe:
        """The recipe of the method, for as many tasks as there are columns.

        Raises:
            ValueError: an unknown method.
        """
        if self.method not in METHODS:
            raise ValueError(
                f"no method of several tasks is called {self.method!r}; {suggest(self.method, list(METHODS))}"
            )
        tasks = len(_names(self.columns)) or 2
        return METHODS[self.method](8 if num_experts is None else num_experts, tasks, self.private)

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read the table, and learn its schema from the training rows."""
        if model is not None:
            raise ValueError("the task multitask has a small model of its own and takes no --model")
        train, validation = self._rows(data)
        targets = _names(self.columns) if data is not None or self.columns else ["clicked=1", "bought=1"]
        schema = Schema.of(train, targets, _names(self.leave_out))
        parts = [schema.encode(rows) for rows in (train, validation)]
        objective = Answers(schema.targets)
        shares = parts[0].labels.nanmean(0).tolist()
        return Setup(
            train=parts[0],
            validation=parts[1],
            objective=objective,
            build=self._builder(schema, parts[0]),
            model=f"shared bottom of {self._levels} level{'s' * (self._levels > 1)}, made sparse as {self.method}",
            data=data or "synthetic rows with two correlated tasks",
            facts={
                "tasks": ", ".join(f"{t.name} ({share:.1%})" for t, share in zip(schema.targets, shares, strict=True)),
                "inputs": f"{len(schema.numbers)} columns of numbers, {len(schema.categories)} of categories",
                "rows": f"{len(train):,} to train on, {len(validation):,} held out",
            },
            save=lambda folder: write_json(folder / "table.json", asdict(schema)),
            answers=lambda trained: shown(trained, parts[1], schema.targets),
            probe={name: value.unsqueeze(0) for name, value in parts[0][0].items() if name != "labels"},
        )

    @property
    def _levels(self) -> int:
        return self.levels if self.method == "ple" else 1

    def _builder(self, schema: Schema, table: Table) -> Callable[[], nn.Module]:
        sizes, numbers, tasks = schema.sizes, table.numbers.shape[1], len(schema.targets)
        shape = {"hidden": self.shape.hidden, "out": self.shape.width // 4, "tower": self.shape.width // 8}
        return lambda: MultiTask(sizes, numbers, tasks, levels=self._levels, **shape)

    def _rows(self, data: str | None) -> tuple[Sequence[Row], Sequence[Row]]:
        if data is None:
            return two_tasks(TRAIN, seed=1), two_tasks(HELD_OUT, seed=2)
        read = read_records(data, Columns(), validation=self.validation)
        return read.train, read.validation


def mmoe(num_experts: int, tasks: int, private: int) -> Recipe:
    """A gate per task over all experts."""
    router = partial(MultiGate, gates=tasks)
    return Recipe(where=LEVELS, num_experts=num_experts, router=router, experts=narrow)


def cgc(num_experts: int, tasks: int, private: int) -> Recipe:
    """A gate per task over its own and the shared experts."""
    router = partial(MultiGate, gates=tasks, private=private)
    return Recipe(where=LEVELS, num_experts=num_experts, router=router, experts=narrow)


def ple(num_experts: int, tasks: int, private: int) -> Recipe:
    """Levels of CGC, each of whose gates reads what the gates before it gave."""
    router = partial(extraction_of_streams, tasks=tasks, private=private)
    experts = partial(narrow_of_streams, tasks=tasks, private=private)
    return Recipe(where=LEVELS, num_experts=num_experts, router=router, experts=experts)


METHODS = {"mmoe": mmoe, "cgc": cgc, "ple": ple}
"""How the shared bottom is made sparse, by name."""


def _names(written: str | None) -> list[str]:
    return [name.strip() for name in (written or "").split(",") if name.strip()]


class Answers(Objective):
    """Cross-entropy of the labels of all tasks, and the area under the ROC curve (AUC) of each.

    Args:
        targets: of the tasks.
    """

    units: ClassVar[Units] = Units("row", "rows", "nats per label")

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the mean cross-entropy of the labels of every row in nats, and its logits and labels."""
        labels, logits = batch["labels"], model(categories=batch["categories"], numbers=batch["numbers"]).logits.float()
        losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
        return Judged(losses.masked_fill(labels.isnan(), torch.nan).nanmean(1).nan_to_num(0.0), (logits, labels))

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return the AUC of every task."""
        logits, labels = (torch.cat([answer[i] for answer in answers]) for i in range(2))
        return {f"AUC {t.name}": auc(logits[:, i], labels[:, i]) for i, t in enumerate(self.targets)}

    def final_scores(self, model: nn.Module, samples: Any) -> dict[str, float]:
        """Return the AUC over all held-out rows."""
        device = next(model.parameters()).device
        starts = range(0, len(samples), AT_ONCE)
        batches = [[samples[i] for i in range(start, min(start + AT_ONCE, len(samples)))] for start in starts]
        return self.scores([self.judge(model, on_device(self.collate(batch), device)).answers for batch in batches])


def auc(scores: Float[Tensor, "T"], labels: Float[Tensor, "T"]) -> float:
    """The chance that a positive sample has a higher score than a negative one, a tie counting half.

    A label that is NaN does not count; without both labels the chance is 0.5.
    """
    kept = ~labels.isnan()
    scores, positive = scores[kept].double(), labels[kept] > 0.5
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return 0.5
    _, group, sizes = scores.unique(sorted=True, return_inverse=True, return_counts=True)
    rank = (sizes.cumsum(0) - (sizes - 1) / 2)[group]  # the mean of the ranks from 1 of equal scores
    return ((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)).item()


@torch.no_grad()
def shown(model: nn.Module, table: Table, targets: Sequence[Target]) -> list[str]:
    """What a model predicts for a few rows, one line each."""
    chosen = list(range(0, len(table), max(1, len(table) // SHOWN)))[:SHOWN]
    device = next(model.parameters()).device
    logits = model(table.categories[chosen].to(device), table.numbers[chosen].to(device)).logits.sigmoid().tolist()
    lines = []
    for i, found in zip(chosen, logits, strict=True):
        answers = [
            f"{target.name} {chance:.0%} (it is {'missing' if math.isnan(label) else 'yes' if label else 'no'})"
            for target, chance, label in zip(targets, found, table.labels[i].tolist(), strict=True)
        ]
        lines.append(f"held-out row {i + 1}: {', '.join(answers)}")
    return ["\n".join(lines)]
