"""`Task`: what a modality adds to a training, and `Setup`: the data, model and objective that it prepares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from moeify.evaluate.objective import Objective, Samples
from moeify.registry import suggest
from moeify.routers import Cluster, Labelled, Lookup
from moeify.sparsify import Recipe
from moeify.train.arguments import Loss


@dataclass(frozen=True)
class Shape:
    """The sizes of the small model that is trained when no model is named.

    Attributes:
        width: D.
        layers: transformer layers.
        heads: attention heads.
        hidden: hidden width of the dense FFN.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 512


def nothing_beside(folder: Path) -> None:
    """A model that needs nothing beside it."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a job needs to know of a task, its data and its model.

    Attributes:
        train: samples to train on.
        validation: samples to evaluate on.
        objective: how a batch is made and judged.
        build: makes the dense model, under the seed of a run.
        model: what the model is, in words.
        data: what the data are, in words.
        facts: further lines of the report.
        save: writes what belongs beside the saved model, such as a tokenizer.
        answers: what a trained model answers, for the report.
        probe: an input to verify the sparse model with; None if one can be guessed.
    """

    train: Samples
    validation: Samples
    objective: Objective
    build: Callable[[], nn.Module]
    model: str
    data: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    save: Callable[[Path], None] = nothing_beside
    answers: Callable[[nn.Module], list[str]] = lambda model: []
    probe: Any = None


def require_inputs(recipe: Recipe, setup: Setup, task: str) -> None:
    """Check that the samples of a task have what the routers of a recipe look up.

    Raises:
        ValueError: they do not, and the routers cannot do without it.
    """
    given = setup.train[0]
    for part in recipe.router(8, recipe.num_experts).modules():
        if isinstance(part, Lookup | Cluster) and part.key not in given:
            clustered = "; --task instruct finds clusters of instructions" if isinstance(part, Cluster) else ""
            raise ValueError(
                f"this recipe's router looks up {part.key!r}, and the samples of {task} have {', '.join(given)}; "
                f"choose another recipe{clustered}"
            )


def labels_of(recipe: Recipe) -> set[str]:
    """The inputs that a recipe's routers keep with their decisions for losses, such as `modality`."""
    parts = recipe.router(8, recipe.num_experts).modules()
    return {part.key for part in parts if isinstance(part, Labelled)}


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A kind of data and model that can be trained; its fields are its settings.

    Attributes:
        name: on the command line.
        length: tokens of a sample, where the task has them.
        shape: the small model's.
    """

    name: ClassVar[str]
    length: int = 128
    shape: Shape = field(default_factory=Shape)

    @abstractmethod
    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read the data and describe the model.

        Args:
            model: a local or hub model to start from; None for a small one from scratch.
            data: a file, folder or hub data set; None for data that need no download.

        Raises:
            FileNotFoundError: there are no such data.
            ImportError: a library that reads them is missing; the message names the extra.
            ValueError: data or a model that do not fit the task.
        """

    def recipe(self, num_experts: int | None) -> Recipe | None:
        """The task's own recipe, for a number of experts; None if every recipe fits."""
        return None

    def suited_to(self, recipe: Recipe) -> Self:
        """The task with the settings that a recipe asks for where the user left them open.

        Raises:
            ValueError: settings that contradict the recipe.
        """
        return self

    def losses(self, recipe: Recipe) -> list[tuple[float, Loss]]:
        """The losses of routing, with their weights, by which the recipe's paper trained for this task."""
        return []

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The settings that only this task has, by name, with their defaults."""
        return {each.name: each.default for each in fields(cls) if each.name not in ("length", "shape")}

    @classmethod
    def of(cls, written: Mapping[str, str], **common: Any) -> Task:
        """The task with settings as a command line or a file writes them.

        Raises:
            ValueError: an unknown setting, or a value of another type; the message names it.
        """
        known = cls.settings()
        for name in written:
            if name not in known:
                raise ValueError(f"the task {cls.name} has no setting {name!r}; {suggest(name, list(known))}")
        return cls(**common, **{name: _parsed(name, text, known[name]) for name, text in written.items()})


def _parsed(name: str, text: str, default: Any) -> Any:
    """A setting as its default's type has it; a default of None is a text that is not given."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"the setting {name} is true or false, not {text!r}")
        return text.lower() == "true"
    if default is None or isinstance(default, str):
        return text
    try:
        return type(default)(text)
    except ValueError:
        raise ValueError(f"the setting {name} is a number such as {default}, not {text!r}") from None
