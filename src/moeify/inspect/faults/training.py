"""How a model is trained, for the diagnosis: a function that runs one training step without the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from moeify.train.rehearse import rehearsing
from moeify.train.trainer import SparseTrainerMixin

Step = Callable[[Sequence[Mapping[str, Any]]], None]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained.

    Attributes:
        rehearse: a context that gives a function running forward and backward of the micro-batches of one optimizer
            step, with the gradients left in the parameters and without the optimizer.
        accumulation: micro-batches per step.
        moves_biases: whether a controller moves selection biases; None if that is not known.
    """

    rehearse: Callable[[], AbstractContextManager[Step]]
    accumulation: int
    moves_biases: bool | None = None


def training_of(trainer: Any) -> Training:
    """The training of a trainer of transformers, moeify's or any other, or of a function that runs one step.

    Args:
        trainer: a trainer; or a function of a list of micro-batches that runs their forward and backward passes.

    Raises:
        TypeError: neither of them.
    """
    if hasattr(trainer, "training_step"):
        controller = trainer.sparse.controller is not None if isinstance(trainer, SparseTrainerMixin) else None
        return Training(
            rehearse=partial(rehearsing, trainer),
            accumulation=trainer.args.gradient_accumulation_steps,
            moves_biases=controller,
        )
    if not callable(trainer):
        raise TypeError(
            f"a {type(trainer).__name__} cannot be rehearsed; pass a trainer of transformers, or a function that runs "
            "forward and backward of a list of micro-batches"
        )
    return Training(rehearse=partial(_of_function, trainer), accumulation=2)


@contextmanager
def _of_function(step: Step) -> Iterator[Step]:
    yield step
