"""`moeify train`: make a model sparse, train it and its dense baseline on the same data, and report the difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli import config
from moeify.cli import options as o

if TYPE_CHECKING:
    from moeify.cli.job import Job


@dataclass(frozen=True, kw_only=True)
class Train:
    """Make a model sparse, and train it and its dense baseline on the same data.

    Without arguments: a small byte-level Llama, sparse with 8 experts of which each token uses 2, learns the text that
    came with Python and torch. Other tasks have a small model and data of their own; --help lists them. The run's
    folder then holds the sparse model, metrics.jsonl, summary.json, pictures and report.html. Ctrl-C saves; --resume
    goes on.
    """

    config: o.Config = None
    task: o.Task = "lm"
    settings: o.TaskSettings = None
    model: o.Model = None
    data: o.Data = None
    recipe: o.RecipeNameOrNone = None
    experts: o.NumExperts = None
    k: o.TopKExperts = None
    output: o.Output = Path("runs/train")
    steps: o.Steps = 400
    minutes: o.Minutes = None
    batch: o.Batch = 16
    accumulate: o.Accumulate = 1
    length: o.Length = 128
    learning_rate: o.LearningRate = 1.2e-3
    weight_decay: o.WeightDecay = 0.1
    balance: o.Balance = None
    losses: o.Losses = None
    scope: o.Scope = "global"
    z: o.Z = 0.0
    controller: o.Controller = None
    dropout: o.Dropout = None
    seed: o.Seed = 0
    seeds: o.Seeds = 1
    evaluations: o.Evaluations = 10
    width: o.Width = 128
    layers: o.Layers = 4
    heads: o.Heads = 4
    hidden: o.Hidden = 512
    device: o.Device = None
    resume: o.Resume = False
    progress: o.Progress = True
    print_config: o.PrintConfig = False

    def job(self) -> Job:
        """The job that the options describe.

        Raises:
            ValueError: options that contradict each other.
        """
        from moeify.cli.job import Job
        from moeify.evaluate.run import Settings
        from moeify.tasks import find_task
        from moeify.tasks.base import Shape
        from moeify.train import SparseArguments

        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"a width of {self.width} cannot be divided into {self.heads} heads of even width")
        if self.batch % self.accumulate:
            raise ValueError(f"{self.batch} samples per step cannot be cut into {self.accumulate} equal micro-batches")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"--device must be cpu or cuda, got {self.device!r}")
        name = self.recipe or ("mixtral" if self.model else "matched")
        balance, controller = o.choose_balance(name, self.balance, self.controller)
        sparse = SparseArguments(
            balance=balance,
            scope=self.scope,  # type: ignore[arg-type]
            z=self.z,
            losses=o.choose_losses(self.losses),
            controller=controller,
            dropout=self.dropout,
            progress=self.progress,
        )
        settings = Settings(
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            evaluations=min(self.evaluations, self.steps),
            minutes=self.minutes,
            pairs=max(1, min(8, self.steps // 50)),
            sparse=sparse,
            device=self.device,
        )
        return Job(
            output=self.output,
            recipe=o.choose_recipe(name, self.experts, self.k),
            settings=settings,
            task=find_task(self.task).of(
                o.read_pairs("--set", self.settings),
                length=self.length,
                shape=Shape(self.width, self.layers, self.heads, self.hidden),
            ),
            model=self.model,
            data=self.data,
            seeds=self.seeds,
            resume=self.resume,
        )

    def run(self) -> None:
        """Run the job, or print its options."""
        job = self.job()
        if self.print_config:
            print(config.written(self), end="")
        else:
            job.run()
