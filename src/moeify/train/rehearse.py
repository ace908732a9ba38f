"""Run the forward and backward passes of a trainer's step, without its optimizer, and leave the trainer unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from moeify.layers import sparse_layers
from moeify.modes import fixed_randomness
from moeify.record import observe
from moeify.train.metrics import Tally
from moeify.train.trainer import SparseTrainerMixin

Step = Callable[[Sequence[Mapping[str, Any]]], None]

_KEPT = (
    "_hooks",
    "_step_loss",
    "_batches",
    "_losses",
    "_tally",
    "_tokens",
    "_since",
    "_speed",
    "current_gradient_accumulation_steps",
)


@contextmanager
def rehearsing(trainer: Any) -> Iterator[Step]:
    """Give a function that runs forward and backward of the micro-batches of one step, as the trainer would.

    Gradients are left in the parameters. With `SparseTrainer` the loads of a step are the f of the next;
    afterwards its state is restored. A step draws the same random numbers every time.

    Args:
        trainer: a trainer of transformers, or one that has its `get_batch_samples` and `training_step`.
    """
    kept = {name: vars(trainer)[name] for name in _KEPT if name in vars(trainer)}
    sparse = isinstance(trainer, SparseTrainerMixin)
    model = trainer.model
    if sparse:
        trainer._step_loss, trainer._tally = copy(trainer._step_loss), Tally()
        trainer._hooks = observe(model, trainer._watch.observe) if sparse_layers(model) else []

    def step(batches: Sequence[Mapping[str, Any]]) -> None:
        with fixed_randomness(model):
            trainer.current_gradient_accumulation_steps = len(batches)
            samples, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
            for inputs in samples:
                trainer.training_step(model, inputs, items)
            if sparse:
                trainer._step_loss.end()

    try:
        yield step
    finally:
        if sparse:
            for handle in trainer._hooks:
                handle.remove()
        for name, value in kept.items():
            setattr(trainer, name, value)
