"""What the tasks that classify share: names of classes, labelled samples, accuracy, and answers for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from moeify.evaluate.objective import Batch, Judged, Objective, Samples, Units
from moeify.evaluate.run import Settings, on_device, reading, validate
from moeify.modes import in_evaluation
from moeify.registry import suggest

MAX_DOMAINS = 24
"""With more classes than this, samples are not grouped by class in the report."""

SHOWN = 8
"""Validation samples whose predictions the report shows."""


@dataclass(frozen=True)
class Classes:
    """The names of the classes, in the order of their numbers."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Sequence[Any], where: str) -> Classes:
        """The classes that the training labels name, sorted; numbers by value.

        Raises:
            ValueError: fewer than two, or a label that is missing or no name.
        """
        for label in labels:
            if not isinstance(label, str | int) or label == "":
                raise ValueError(f"{where}: a label is a name or a whole number, not {label!r:.60}")
        kinds = set(labels)
        if len(kinds) < 2:
            raise ValueError(f"{where} has one class, {labels[0]!r:.60}, and nothing to tell apart; give two or more")
        numbers = all(isinstance(label, int) for label in kinds)
        return cls(tuple(str(label) for label in (sorted(kinds) if numbers else sorted(map(str, kinds)))))

    def number(self, label: Any, where: str) -> int:
        """The number of a label.

        Raises:
            ValueError: no training sample has it.
        """
        try:
            return self._numbers[str(label)]
        except KeyError:
            known = suggest(str(label), list(self.names[:20]))
            raise ValueError(f"{where}: the label {label!r} is in no training sample; {known}") from None

    @property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def config(self) -> dict[str, Any]:
        """The settings of a model of transformers that names its classes."""
        id2label = dict(enumerate(self.names))
        return {"num_labels": len(self.names), "id2label": id2label, "label2id": self._numbers}


class LabelledSamples(Dataset[dict[str, Any]]):
    """Samples with `labels`; their inputs are made when they are read.

    Args:
        items: what `inputs` makes the model's inputs of, such as tokens or an encoded image.
        labels: a class number each.
        domains: the group of each, for the report.
        length: pieces of a sample on average.
        inputs: makes the inputs of an item.
        super_classes: the number of each sample's super-class, a further column that routers look up; None for none.
    """

    def __init__(
        self,
        items: Sequence[Any],
        labels: Sequence[int],
        domains: Sequence[str],
        length: int,
        inputs: Callable[[Any], Mapping[str, Any]],
        super_classes: Sequence[int] | None = None,
    ) -> None:
        self.items, self.labels, self.domains, self.length, self.inputs = items, labels, domains, length, inputs
        self.super_classes = super_classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the inputs and the label of a sample, and its super-class."""
        sample = {**self.inputs(self.items[index]), "labels": torch.tensor(self.labels[index])}
        if self.super_classes is not None:
            sample["super_class"] = torch.tensor(self.super_classes[index])
        return sample

    def domain_of(self, index: int) -> str:
        """Return the group of a sample."""
        return self.domains[index]


class Classification(Objective):
    """Cross-entropy of the classes, and accuracy. The model returns `logits` (B, classes).

    Args:
        collate: makes a batch of samples; by default their tensors are stacked.
    """

    units: ClassVar[Units] = Units("token", "tokens", "nats per text")

    def __init__(self, collate: Callable[[Sequence[Any]], Batch] | None = None) -> None:
        self._collate = super().collate if collate is None else collate

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of some samples."""
        return self._collate(samples)

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the cross-entropy of every sample in nats, and whether its class was predicted."""
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        return Judged(nn.functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels)

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": torch.cat(list(answers)).float().mean().item()}

    def final_scores(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """Return the accuracy on up to 5,000 samples; along the way it is that of fewer."""
        return validate(model, samples, Settings(batch=64, evaluation_blocks=5000), self).scores


@torch.no_grad()
def predictions(
    model: nn.Module, samples: LabelledSamples, objective: Objective, classes: Classes, describe: Callable[[int], str]
) -> list[str]:
    """What a model predicts for a few samples, evenly taken, one line each."""
    chosen = range(0, len(samples), max(1, len(samples) // SHOWN))[:SHOWN]
    batch = on_device(objective.collate([samples[i] for i in chosen]), next(model.parameters()).device)
    labels = batch.pop("labels").tolist()
    with in_evaluation(model), reading(model, batch) as inputs:
        found = model(**inputs).logits.argmax(-1).tolist()
    lines = []
    for i, label, predicted in zip(chosen, labels, found, strict=True):
        right = "" if predicted == label else f" (it is {classes.names[label]})"
        lines.append(f"{describe(i)} -> {classes.names[predicted]}{right}")
    return ["\n".join(lines)]


def groups(labels: Sequence[int], classes: Classes, given: Sequence[Any], everything: str) -> list[str]:
    """The group of every sample: the one that is given, else its class if there are few, else one for all."""
    if any(value is not None and value != "" for value in given):
        return [str(value) for value in given]
    if len(classes.names) <= MAX_DOMAINS:
        return [classes.names[label] for label in labels]
    return [everything] * len(labels)
