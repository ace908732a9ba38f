"""One training run whose validation loss is measured along the way, over tokens, FLOPs and seconds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from moeify.evaluate.objective import NextToken, Objective, Samples
from moeify.flops import Count, count
from moeify.layers import sparse_layers
from moeify.modes import in_evaluation
from moeify.progress import with_progress
from moeify.routers.lookup import split_router_inputs
from moeify.train import SparseArguments, SparseTrainer


class Stopped(Exception):
    """A signal stopped a run before its end; a checkpoint is saved."""


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        batch: samples (of a language model: blocks of tokens) per step.
        accumulate: micro-batches that the samples of a step are cut into.
        learning_rate: the peak of a cosine with a linear warm-up over the first twentieth of the steps.
        weight_decay: AdamW's.
        seed: of the order of data, of initialisation where a function builds the model, and of dropout.
        evaluations: how often the validation loss is measured, evenly over the steps, besides once before the first.
        evaluation_blocks: on how many validation samples at most, taken evenly from all of them.
        minutes: take fewer steps where a pair of runs would take longer, by the measured cost of a step.
        pairs: how often a comparison measures the cost of a step of both models; 0 uses the seconds of the runs.
        sparse: how experts are kept balanced.
        freeze: parts of the sparse model that do not learn, as of `moeify.train.freeze`; the dense model learns whole.
        device: where to train: `cpu`, `cuda`, or None for the best there is.
        extra: further arguments of transformers' `TrainingArguments`.
    """

    steps: int = 400
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.1
    seed: int = 0
    evaluations: int = 10
    evaluation_blocks: int = 256
    minutes: float | None = None
    pairs: int = 8
    sparse: SparseArguments = field(default_factory=SparseArguments)
    freeze: tuple[str, ...] = ()
    device: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A moment of a run.

    Attributes:
        step: optimizer steps taken.
        tokens: training tokens, patches or frames seen.
        flops: FLOPs of training so far, three times those of the forward passes.
        seconds: time spent in training, without evaluation.
        loss: mean validation loss of a sample; of a language model in nats per token.
        scores: those of the validation set by name, such as `accuracy`.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validation:
    """A model's results on a validation set.

    Attributes:
        loss: the mean of its samples.
        domains: the mean by domain.
        scores: by name.
    """

    loss: float
    domains: dict[str, float]
    scores: dict[str, float]


@dataclass(frozen=True)
class Run:
    """The measurements of one training run.

    Attributes:
        name: of the run; `sparse` or `dense` in a comparison.
        seed: the run's seed.
        count: parameters and FLOPs per token.
        points: the validation loss over the run, from before the first step on.
        domains: validation loss by domain at the end.
        scores: those of the validation set at the end, by name.
    """

    name: str
    seed: int
    count: Count
    points: list[Point]
    domains: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Training speed over the whole run."""
        return self.points[-1].tokens / self.points[-1].seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The inverse of `to_dict`."""
        points = [Point(**point) for point in values["points"]]
        return cls(**values | {"count": Count(**values["count"]), "points": points})


def train_run(
    name: str,
    model: nn.Module,
    train: Samples,
    validation: Samples,
    folder: Path,
    settings: Settings,
    *,
    objective: Objective | None = None,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> Run:
    """Train a model, measuring its validation loss and scores along the way.

    Args:
        name: what to call the run.
        model: takes the batches of the objective, and returns an output with `loss`; sparse or dense.
        train: samples to train on, in an order that the seed decides; it repeats if the steps need more.
        validation: samples to evaluate on.
        folder: for checkpoints and `metrics.jsonl`.
        settings: how long and how fast.
        objective: how batches are made and answers judged; by default those of a language model.
        resume: continue from the newest valid checkpoint in the folder.
        callbacks: further ones of the Trainer.

    Raises:
        Stopped: a signal ended the run before its last step; a checkpoint is saved.
    """
    objective = NextToken() if objective is None else objective
    size = count(model, tokens=train.length)
    curve = _Curve(
        size, settings.batch * train.length, settings, lambda model: validate(model, validation, settings, objective)
    )
    trainer = make_trainer(model, train, folder, settings, [curve, *(callbacks or [])], objective)
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.state.global_step < settings.steps:
        saved = "which could not be saved" if trainer.failures else f"saved in {folder}"
        raise Stopped(f"stopped after step {trainer.state.global_step} of {settings.steps}, {saved}")
    last = validate(model, validation, settings, objective)
    with in_evaluation(model), torch.no_grad():
        scores = last.scores | objective.final_scores(model, validation)
    return Run(
        name=name, seed=settings.seed, count=size, points=curve.points, domains=last.domains, scores=scores
    )  # fmt: skip


def make_trainer(
    model: nn.Module,
    train: Samples,
    folder: Path,
    settings: Settings,
    callbacks: list[TrainerCallback],
    objective: Objective,
) -> SparseTrainer:
    """The trainer of one run; a dense model has no balancing losses."""
    is_sparse = bool(sparse_layers(model))
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch // settings.accumulate,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.steps // 20),
        "logging_steps": max(1, settings.steps // 40),
        "save_steps": max(1, settings.steps // 4),
        "save_total_limit": 2,  # if the newer one is damaged, a resumed run continues from the other
        "report_to": "none",
        "seed": settings.seed,
        "use_cpu": settings.device == "cpu",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | settings.extra
    trainer = SparseTrainer(
        model,
        TrainingArguments(**options),
        train_dataset=cast(Any, train),
        data_collator=objective.collate,
        sparse=settings.sparse if is_sparse else SparseArguments(balance=0.0, progress=settings.sparse.progress),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Curve(TrainerCallback, ExportableState):
    """Measures the validation loss at even intervals, outside the training time, and is saved in checkpoints."""

    def __init__(
        self, size: Count, tokens_per_step: int, settings: Settings, measure: Callable[[nn.Module], Validation]
    ) -> None:
        self.size, self.tokens_per_step, self.settings, self.measure = size, tokens_per_step, settings, measure
        self.points: list[Point] = []
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            saved = cast(dict[str, Any], state.stateful_callbacks)["_Curve"]
            self.seconds, self.points = saved["seconds"], [Point(**point) for point in saved["points"]]
        else:
            self._measure(0, kwargs["model"])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started
        step, total, times = state.global_step, self.settings.steps, self.settings.evaluations
        if step * times // total > (step - 1) * times // total:
            self._measure(step, kwargs["model"])

    def _measure(self, step: int, model: nn.Module) -> None:
        tokens = step * self.tokens_per_step
        found, flops = self.measure(model), tokens * self.size.training_flops
        self.points.append(Point(step, tokens, flops, self.seconds, found.loss, found.scores))

    def state(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "points": [asdict(point) for point in self.points]}


@torch.no_grad()
def validate(model: nn.Module, samples: Samples, settings: Settings, objective: Objective) -> Validation:
    """The loss over the evaluation samples, for each domain among them, and the scores."""
    device = next(model.parameters()).device
    most = min(settings.evaluation_blocks, len(samples))
    chosen = [(2 * i + 1) * len(samples) // (2 * most) for i in range(most)]
    by_domain: dict[str, list[float]] = {}
    answers = []
    for start in with_progress(range(0, len(chosen), settings.batch), "validation, batches"):
        indices = chosen[start : start + settings.batch]
        batch = on_device(objective.collate([samples[i] for i in indices]), device)
        with in_evaluation(model), reading(model, batch) as inputs:
            judged = objective.judge(model, inputs)
        answers.append(judged.answers)
        for i, loss in zip(indices, judged.losses.tolist(), strict=True):
            by_domain.setdefault(samples.domain_of(i), []).append(loss)
    everything = [loss for losses in by_domain.values() for loss in losses]
    domains = {name: fmean(losses) for name, losses in by_domain.items()}
    return Validation(fmean(everything), domains, objective.scores(answers))


@contextmanager
def reading(model: nn.Module, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The model's inputs and the labels of a batch; meanwhile routers can look up its other columns.

    Rows that are packed, as their positions tell, are read without a cache, with which transformers does not look for
    documents.
    """
    taken = {*inspect.signature(model.forward).parameters, "labels"}
    if "position_ids" in batch:
        batch = batch | {"use_cache": False}
    with split_router_inputs(model, batch) as inputs:
        yield {name: value for name, value in inputs.items() if name in taken}


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
