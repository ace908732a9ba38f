"""`moeify train`: make a model sparse, train it and its dense baseline on the same data, and report the difference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli import config, memory
from moeify.cli import options as o

if TYPE_CHECKING:
    from moeify.cli.finetune import FineTune
    from moeify.cli.job import Job

EVALUATED = 2**15
"""About how many tokens a measurement of the validation loss reads, 16 samples at least and 256 at most."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Make a model sparse, and train it and its dense baseline on the same data.

    Without arguments: a small byte-level Llama, sparse with 8 experts of which each token uses 2, learns the text that
    came with Python and torch. Other tasks have a small model and data of their own; --help lists them. The run's
    folder then holds the sparse model, metrics.jsonl, summary.json, pictures and report.html. Ctrl-C saves; --resume
    goes on. With --finetune a model that is sparse already is fine-tuned as it is, without a dense baseline.
    """

    config: o.Config = None
    task: o.Task = "lm"
    settings: o.TaskSettings = None
    model: o.Model = None
    finetune: o.FineTuneBy = None
    threshold: o.Threshold = 0.2
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
    learning_rate: o.LearningRate = None
    freeze: o.Freeze = None
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
        o.check_device(self.device)
        task = find_task(self.task).of(
            o.read_pairs("--set", self.settings),
            length=self.length,
            shape=Shape(self.width, self.layers, self.heads, self.hidden),
        )
        name = self.recipe or ("mixtral" if self.model else "matched")
        if (recipe := task.recipe(self.experts)) is not None:
            if self.recipe or self.k:
                raise ValueError(f"the task {task.name} has recipes of its own and takes no --recipe or --k; see --set")
            balance, controller = self.balance or 0.0, o.choose_controller(self.controller)
            losses = []
        else:
            recipe = o.choose_recipe(name, self.experts, self.k)
            task = task.suited_to(recipe)
            balance, controller = o.choose_balance(name, self.balance, self.controller)
            if (losses := task.losses(recipe)) and self.balance is None:
                balance = 0.0
        sparse = SparseArguments(
            balance=balance,
            scope=self.scope,  # type: ignore[arg-type]
            z=self.z,
            losses=[*losses, *o.choose_losses(self.losses)],
            controller=controller,
            dropout=self.dropout,
            progress=self.progress,
        )
        settings = Settings(
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            learning_rate=self._learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            evaluations=min(self.evaluations, self.steps),
            evaluation_blocks=min(256, max(16, EVALUATED // self.length)),
            minutes=self.minutes,
            pairs=max(1, min(8, self.steps // 50)),
            sparse=sparse,
            device=self.device,
            freeze=o.choose_freeze(recipe, self.model, self.freeze),
        )
        return Job(
            output=self.output,
            recipe=recipe,
            settings=settings,
            task=task,
            model=self.model,
            data=self.data,
            seeds=self.seeds,
            resume=self.resume,
        )

    @property
    def _learning_rate(self) -> float:
        default = 1.2e-3 if self.finetune is None else 1e-5
        return default if self.learning_rate is None else self.learning_rate

    def finetuning(self) -> FineTune:
        """The fine-tuning that the options describe.

        Raises:
            ValueError: no model, or options that are those of a comparison.
        """
        from moeify.cli.finetune import FineTune

        if self.model is None:
            raise ValueError("--finetune is for a model that is sparse already; name it by --model")
        for name in ("recipe", "experts", "k", "minutes", "balance", "losses", "controller", "dropout", "freeze"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} does not go with --finetune, which leaves the layers as they are")
        job = replace(self, recipe="mixtral").job()
        assert self.finetune is not None
        return FineTune(
            way=self.finetune, threshold=self.threshold, model=self.model, output=self.output, settings=job.settings,
            task=job.task, data=self.data, resume=self.resume,
        )  # fmt: skip

    def run(self) -> None:
        """Run the job, or print its options."""
        memory.keep_freed()
        job = self.job() if self.finetune is None else self.finetuning()
        if self.print_config:
            print(config.written(self), end="")
        else:
            job.run()
