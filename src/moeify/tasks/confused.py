"""Super-classes of a task's classes, found in what a dense model confuses after a short training (Mobile V-MoE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from moeify.evaluate.objective import Batch, Objective
from moeify.modes import in_evaluation
from moeify.progress import with_progress
from moeify.tasks.classify import LabelledSamples
from moeify.train.super_classes import confusion, super_classes

STEPS, BATCH, READ = 300, 32, 4000
"""Of the short training, and how many samples the model then classifies."""


def confused_classes(
    build: Callable[[], nn.Module], samples: LabelledSamples, objective: Objective, number: int
) -> list[int]:
    """The super-class of every class: classes that a dense model confuses are together (arXiv 2309.04354, section 3).

    The same call gives the same super-classes. Held-out samples are not used.

    Args:
        build: makes the dense model.
        samples: the training samples.
        objective: makes batches.
        number: of super-classes.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: more super-classes than classes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches = _endless(samples, objective)
        for _ in with_progress(range(STEPS), "super-classes, steps of a dense model"):
            optimizer.zero_grad()
            model(**next(batches)).loss.backward()
            optimizer.step()
        chosen = range(0, len(samples), max(1, len(samples) // READ))
        predicted: list[int] = []
        with in_evaluation(model), torch.no_grad():
            for start in range(0, len(chosen), BATCH):
                batch = objective.collate([samples[i] for i in chosen[start : start + BATCH]])
                batch.pop("labels")
                predicted += model(**batch).logits.argmax(-1).tolist()
    labels = torch.tensor([samples.labels[i] for i in chosen])
    classes = 1 + max(samples.labels)
    return super_classes(confusion(torch.tensor(predicted), labels, classes), number).tolist()


def _endless(samples: LabelledSamples, objective: Objective) -> Iterator[Batch]:
    while True:
        yield from DataLoader(samples, BATCH, shuffle=True, collate_fn=objective.collate)
