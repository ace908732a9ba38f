"""What `moeify train` can train: one file per task, found by name. Nothing heavy is imported before a task is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeify.registry import suggest

if TYPE_CHECKING:
    from moeify.tasks.base import Task


@dataclass(frozen=True)
class Entry:
    """Where a task is defined.

    Attributes:
        module: its file in this folder.
        task: the name of its class.
        line: what it learns, and its score.
    """

    module: str
    task: str
    line: str


TASKS = {
    "lm": Entry("lm", "LanguageModel", "predict the next token of a text (perplexity)"),
    "classify-text": Entry("classify_text", "ClassifyText", "name the class of a text (accuracy)"),
    "classify-image": Entry("classify_image", "ClassifyImage", "name the class of an image (accuracy)"),
    "classify-audio": Entry("classify_audio", "ClassifyAudio", "name the class of a sound (accuracy)"),
    "contrastive": Entry("contrastive", "Contrastive", "match pictures and captions (recall@1 and @5)"),
    "seq2seq": Entry("seq2seq", "Seq2Seq", "translate a text (chrF, token accuracy)"),
    "instruct": Entry("instruct", "Instruct", "answer an instruction (perplexity, exact match)"),
    "multitask": Entry("multitask", "ManyTasks", "predict columns of a table (AUC)"),
}  # fmt: skip
"""Every task by its name on the command line."""


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ValueError: an unknown name; the message suggests the nearest.
    """
    if name not in TASKS:
        raise ValueError(f"no task is named {name!r}; {suggest(name, list(TASKS))}")
    entry = TASKS[name]
    found: Any = getattr(import_module(f"moeify.tasks.{entry.module}"), entry.task)
    return found
