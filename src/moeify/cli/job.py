"""The job of `train` and `compare`: train a sparse model and its dense baseline for a task, and write the results."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from moeify.cli import threads
from moeify.cli.inputs import JOB
from moeify.evaluate.run import Settings, Stopped
from moeify.evaluate.versus import Versus, versus
from moeify.files import read_json, write_json, write_text
from moeify.folders import RUN_LOCK, locked
from moeify.inspect.load import ExpertLoad, expert_load
from moeify.inspect.page import comparison_rows, load_rows, says, score_rows, size_rows, write_report
from moeify.inspect.pictures import draw_load, draw_losses
from moeify.sparsify import Recipe
from moeify.store import save
from moeify.tasks.base import Setup, Task, require_inputs
from moeify.version import __version__

LOAD_TOKENS = 2**11
"""About how many tokens of a domain the load of the experts is counted on: 2 samples at least and 16 at most."""


@dataclass(frozen=True)
class Job:
    """The settings of a comparison.

    Attributes:
        output: the run's folder.
        recipe: how the dense model is made sparse.
        settings: how long and how fast both are trained.
        task: the kind of data and model, with its settings.
        model: a local or hub model to start from; None for the task's small one from scratch.
        data: a file, folder or hub data set; None for the task's own.
        seeds: number of pairs of runs.
        resume: continue where a stopped call ended.
    """

    output: Path
    recipe: Recipe
    settings: Settings
    task: Task
    model: str | None = None
    data: str | None = None
    seeds: int = 1
    resume: bool = False

    def run(self) -> Versus:
        """Train, compare, and leave checkpoint, metrics, pictures, samples and report in the run's folder.

        Raises:
            ValueError: the folder holds another run; or data, model or recipe are invalid.
            KeyboardInterrupt: a signal ended it; `resume` continues it.
        """
        try:
            self._make_folder()
            with locked(self.output, RUN_LOCK, "is running"):
                return self._run()
        except (Stopped, KeyboardInterrupt) as stop:
            message = f"{str(stop) or 'interrupted'}; go on with the same command and --resume"
            raise KeyboardInterrupt(message) from None

    def _run(self) -> Versus:
        started = time.perf_counter()
        console = Console(soft_wrap=True, markup=False, highlight=False)
        self._begin()
        console.print(threads.describe())
        setup = self.task.prepare(self.model, self.data)
        require_inputs(self.recipe, setup, self.task.name)
        for name, value in {"data": setup.data, **setup.facts}.items():
            console.print(f"{name}: {value}")
        models: dict[str, nn.Module] = {}
        result = versus(
            setup.build, self.recipe, setup.train, setup.validation, self.output, self.settings,
            objective=setup.objective, probe=setup.probe, seeds=self.seeds, resume=self.resume, log=console.print,
            on_model=models.__setitem__,
        )  # fmt: skip
        notes = {"Data": setup.data, "Balance": self.settings.sparse.describe()}
        save(models["sparse"], self.output / "model", notes=notes)
        setup.save(self.output / "model")
        load = self._load(models["sparse"], setup, console)
        samples = {name: setup.answers(model) for name, model in models.items()}
        facts = self._facts(setup, result.steps)
        cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory()}
        memory = cost["peak_memory_bytes"]
        facts["whole job"] = f"{cost['seconds']:,.0f} s" + (
            "" if memory is None else f", at most {memory / 2**20:,.0f} MiB of memory"
        )
        self._write(result, load, samples, facts, cost)
        self._show(console, result, load, samples)
        return result

    def _make_folder(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"{self.output} is a file; name a folder for the run")
        self.output.mkdir(parents=True, exist_ok=True)
        if not os.access(self.output, os.W_OK):
            raise ValueError(f"{self.output} cannot be written to; name another --output")

    def _begin(self) -> None:
        """Record the job in its folder, or check that the folder holds an earlier start of the same job."""
        output, begun = self.output, self.output / JOB
        used = any(path not in (begun, output / RUN_LOCK) for path in output.iterdir())
        if used and not self.resume:
            raise ValueError(f"{output} is not empty; pass --resume to go on with it, or another --output")
        ours = json.loads(json.dumps(self._decisive(), default=_written))
        theirs = read_json(begun) if used and begun.is_file() else ours
        others = [
            f"{name} {theirs.get(name)!r} instead of {value!r}"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]
        if others:
            raise ValueError(
                f"{output} was begun with {', '.join(others)}; go on with its own options, or in another --output"
            )
        if not (used and begun.is_file()):
            write_json(begun, ours)

    def _decisive(self) -> dict[str, Any]:
        """The settings that determine the results, by name; a resumed job must have the same."""
        settings = {
            name: value for name, value in vars(self.settings).items() if name not in ("sparse", "device", "pairs")
        }
        balance = {name: value for name, value in vars(self.settings.sparse).items() if name != "progress"}
        job = {"task": self.task.name, "model": self.model, "data": self.data, "recipe": self.recipe.to_dict()}
        task = asdict(self.task)
        return job | task.pop("shape") | task | settings | balance

    def _facts(self, setup: Setup, steps: int) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "model": setup.model,
            "data": setup.data,
            **setup.facts,
            "steps": steps,
            f"{setup.objective.units.pieces} per step": self.settings.batch * setup.train.length,
            "learning rate": self.settings.learning_rate,
            "balance": self.settings.sparse.describe(),
            "seeds": self.seeds,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "moeify": __version__,
            "threads": torch.get_num_threads(),
        }

    def _load(self, model: nn.Module, setup: Setup, console: Console) -> ExpertLoad | None:
        """The load of the experts; None where tokens are mixed, so that no expert has tokens of its own."""
        try:
            return expert_load(
                model,
                setup.validation,
                per_domain=max(2, min(16, LOAD_TOKENS // setup.validation.length)),
                batch=min(8, self.settings.batch),
                collate=setup.objective.collate,
            )
        except ValueError as error:
            console.print(f"no table of experts: {error}")
            return None

    def _write(
        self,
        result: Versus,
        load: ExpertLoad | None,
        samples: dict[str, list[str]],
        facts: dict[str, Any],
        cost: dict[str, float | None],
    ) -> None:
        experts = {} if load is None else load.to_dict()
        summary = {"facts": facts, "job": cost, **result.to_dict(), "experts": experts, "samples": samples}
        write_json(self.output / "summary.json", summary)
        metrics = self.output / f"sparse-{self.settings.seed}" / "metrics.jsonl"
        write_text(self.output / "metrics.jsonl", metrics.read_text(encoding="utf-8"))
        drawn = [draw_picture(self.output / "loss.png", draw_losses, result)]
        if load is not None:
            drawn.append(draw_picture(self.output / "experts.png", draw_load, load))
        pictures = [file for file in drawn if file is not None]
        write_report(self.output / "report.html", result, load, pictures, samples, facts)

    def _show(self, console: Console, result: Versus, load: ExpertLoad | None, samples: dict[str, list[str]]) -> None:
        for name, texts in samples.items():
            console.rule(f"the {name} model answers")
            console.print("\n---\n".join(texts))
        for title, (heading, rows) in (
            ("size and speed", size_rows(result)),
            *([] if load is None else [("experts", load_rows(load))]),
            ("scores", score_rows(result)),
            (f"validation loss, {result.units.loss} (lower is better)", comparison_rows(result)),
        ):
            shown = Table(*heading, title=title, title_justify="left")
            for row in rows:
                shown.add_row(*row)
            console.print(shown)
        for line in says(result, load):
            console.print(line)
        console.print(f"everything is in {self.output}; open {self.output / 'report.html'}")


def _written(thing: Any) -> str:
    """A setting as job.json has it: the name of a function, else how Python writes it."""
    return getattr(thing, "__name__", None) or repr(thing)


def draw_picture(file: Path, draw: Callable[[Any, Path], None], facts: Any) -> Path | None:
    """Draw a picture into a file and return it; None if it cannot be drawn, which does not end the run."""
    try:
        draw(facts, file)
    except Exception as error:  # no error of fonts or domain names may lose a long training
        print(f"moeify: {file.name} could not be drawn: {error}")
        return None
    return file


def peak_memory() -> int | None:
    """Bytes of main memory that the process has held at most, None where the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
