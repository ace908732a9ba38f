"""The job of `train --finetune`: fine-tune a model that is sparse already in a way that a paper found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moeify.cli import threads
from moeify.cli.job import peak_memory
from moeify.evaluate.run import Run, Settings, Stopped, train_run
from moeify.files import read_json, write_json
from moeify.folders import RUN_LOCK, locked
from moeify.layers import sparse_layers
from moeify.origin import Origin
from moeify.registry import suggest
from moeify.store import save
from moeify.tasks.base import Setup, Task
from moeify.tasks.models import load_dense, load_model
from moeify.train import (
    SparseArguments,
    expert_relevance,
    finetune,
    join_experts,
    lora_experts,
    train_experts,
    trainable,
)
from moeify.train.esft import Chosen
from moeify.train.finetune import fine_tunings

ESFT = ("esft", "esft_lora")
SAMPLED = 32 * 4096
"""Tokens that experts are scored on, as in ESFT."""


@dataclass(frozen=True)
class FineTune:
    """The settings of a fine-tuning.

    Attributes:
        way: a name of `fine_tunings`, `esft` or `esft_lora`.
        threshold: ESFT's p, the share of the relevance that the chosen experts have.
        model: a folder or hub name of a sparse model, moeify's or transformers'.
        output: the run's folder.
        settings: how long and how fast.
        task: the kind of data.
        data: a file, folder or hub data set; None for the task's own.
        resume: continue where a stopped call ended.
    """

    way: str
    threshold: float
    model: str
    output: Path
    settings: Settings
    task: Task
    data: str | None = None
    resume: bool = False

    def run(self) -> Run:
        """Fine-tune, and leave the model, or the adapter, metrics and summary in the run's folder.

        Raises:
            ValueError: an unknown way, a dense model, a folder that is not empty, or unsuitable data.
            KeyboardInterrupt: a signal ended it; `resume` continues it.
        """
        ways = [*fine_tunings, *ESFT]
        if self.way not in ways:
            raise ValueError(f"no way to fine-tune is called {self.way!r}; {suggest(self.way, ways)}")
        self.output.mkdir(parents=True, exist_ok=True)
        if not self.resume and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty; pass --resume to go on with it, or another --output")
        try:
            with locked(self.output, RUN_LOCK, "is running"):
                return self._run()
        except Stopped as stop:
            raise KeyboardInterrupt(f"{stop}; go on with the same command and --resume") from None

    def _run(self) -> Run:
        started = time.perf_counter()
        console = Console(soft_wrap=True, markup=False, highlight=False)
        console.print(threads.describe())
        setup = self.task.prepare(self.model, self.data)
        console.print(f"data: {setup.data}")
        folder = Path(self.model)
        model = (load_model(folder) if folder.is_dir() else load_dense(self.model)).float()
        if not sparse_layers(model):
            raise ValueError(f"{self.model} is dense; leave out --finetune, and it is made sparse and trained")
        model, sparse, chosen = self._prepared(model, setup)
        settings = replace(self.settings, sparse=replace(sparse, progress=self.settings.sparse.progress))
        run = train_run(
            self.way, model, setup.train, setup.validation, self.output / "run", settings,
            objective=setup.objective, resume=self.resume,
        )  # fmt: skip
        total = trainable(model).total
        self._save(model, setup)
        first, last = run.points[0], run.points[-1]
        write_json(self.output / "summary.json", {
            "finetune": self.way, "model": self.model, "data": setup.data, "chosen": chosen, "trained": total.trained,
            "loss_before": first.loss, "loss_after": last.loss, "scores": run.scores, "tokens": last.tokens,
            "seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory(),
        })  # fmt: skip
        unit = setup.objective.units.loss
        console.print(
            f"{total.trained:,} of {total.parameters:,} parameters learnt from {last.tokens:,} "
            f"{setup.objective.units.pieces}; validation loss {first.loss:.4f} before, {last.loss:.4f} after, {unit}"
        )
        console.print(f"everything is in {self.output}")
        return run

    def _prepared(self, model: Any, setup: Setup) -> tuple[Any, SparseArguments, Chosen | None]:
        """The model with what the way freezes frozen, its losses, and the experts that ESFT chose."""
        if self.way not in ESFT:
            return model, finetune(model, self.way), None
        kept = self.output / "experts.json"  # a resumed run trains the experts that it began with
        if not (self.resume and kept.is_file()):
            relevance = expert_relevance(model, self._samples(setup))
            relevance.show(self.threshold)
            write_json(kept, relevance.choose(self.threshold))
        chosen: Chosen = read_json(kept)
        if self.way == "esft":
            train_experts(model, chosen)
        else:
            model = lora_experts(model, chosen, task_type="CAUSAL_LM")
            trainable(model).show()
        return model, SparseArguments(balance=0.0), chosen

    def _samples(self, setup: Setup) -> Iterator[dict[str, Any]]:
        """Batches of samples that are taken evenly from all training samples."""
        step = max(1, len(setup.train) * setup.train.length // SAMPLED)
        indices = range(0, len(setup.train), step)
        for start in range(0, len(indices), self.settings.batch):
            batch = [setup.train[i] for i in indices[start : start + self.settings.batch]]
            yield setup.objective.collate(batch)

    def _save(self, model: Any, setup: Setup) -> None:
        if self.way == "esft_lora":
            model.save_pretrained(self.output / "adapter")
            return
        join_experts(model)
        if Origin.of(model).recipe is not None:
            save(model, self.output / "model", notes={"Data": setup.data, "Fine-tuning": self.way})
        else:
            model.save_pretrained(self.output / "model")
        setup.save(self.output / "model")
