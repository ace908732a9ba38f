"""Exporters by name, and the steps of an export: write a temporary folder, read it by the target, compare, rename."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moeify.export.model_spec import Unsupported
from moeify.export.probe import Probe
from moeify.files import read_json, share_tensors, write_json
from moeify.given import model_given, path_given
from moeify.registry import suggest
from moeify.version import __version__

RECORD = "moeify_export.json"


@dataclass(frozen=True)
class Verification:
    """The result of reading an export with its target program.

    Attributes:
        program: name and version.
        difference: the largest absolute difference of logits, None if the program did not compute any.
        agreement: the share of positions at which the largest logit is the same one, None if there are no positions.
        note: a further remark.
    """

    program: str
    difference: float | None
    agreement: float | None = None
    note: str = ""

    def __str__(self) -> str:
        """The result in one line."""
        found = {None: "logits not compared", 0.0: "logits bitwise equal"}.get(
            self.difference, f"logits differ by {self.difference} at most"
        )
        if self.difference and self.agreement is not None:
            found += f"; the same most likely token or class at {self.agreement:.1%} of the positions"
        return f"{self.program}: {found}" + (f"; {self.note}" if self.note else "")


class Exporter(ABC):
    """Writes models in the format of another program, and verifies them with it."""

    @abstractmethod
    def match(self, model: nn.Module) -> Any:
        """The model expressed in the terms of the target, for `write`.

        Raises:
            Unsupported: the target cannot express the model.
        """

    @property
    def question(self) -> Hashable:
        """What `supports` asks of a model: exporters with equal questions give the same answer."""
        return self

    def obstacle(self, model: nn.Module) -> str | None:
        """What keeps this target alone, of those with its question, from computing a model; None, unless overridden."""
        return None

    def supports(self, model: nn.Module) -> str | None:
        """The reason why the target cannot express a model, None if it can."""
        if reason := self.obstacle(model):
            return reason
        try:
            self.match(model)
        except Unsupported as error:
            return str(error)
        return None

    def probe_of(self, model: nn.Module) -> Any:
        """Inputs of a model, and what it computes for them, for `verify`."""
        return Probe.of(model)

    def probe_from_dict(self, values: dict[str, Any]) -> Any:
        """A probe that `to_dict` wrote."""
        return Probe.from_dict(values)

    @abstractmethod
    def write(self, model: nn.Module, folder: Path) -> list[str]:
        """Write a model into an empty folder.

        Returns:
            What the files are, and what was rewritten, in words.

        Raises:
            Unsupported: the target cannot express the model.
        """

    @abstractmethod
    def verify(self, folder: Path, probe: Any) -> Verification:
        """Read a folder by the target, and compare.

        Raises:
            ValueError: the target cannot read it, or computes something else.
        """


_EXPORTERS: dict[str, Exporter] = {}


def register_exporter(name: str, exporter: Exporter) -> None:
    """Register an exporter under its name, replacing any of the same name."""
    _EXPORTERS[name] = exporter


def exporters() -> list[str]:
    """The names of all exporters."""
    return list(_EXPORTERS)


def find_exporter(name: str) -> Exporter:
    """The exporter with this name.

    Raises:
        ValueError: no exporter has this name.
    """
    if name not in _EXPORTERS:
        raise ValueError(f"no exporter is called {name!r}; {suggest(name, exporters())}")
    return _EXPORTERS[name]


def supports(model: nn.Module) -> dict[str, str | None]:
    """For every exporter, the reason why it cannot express a model, None if it can.

    For graphs the model is traced once, which takes seconds; `find_exporter(name).supports(model)` asks one exporter.
    """
    model = model_given(model)
    answers: dict[Hashable, str | None] = {}
    obstacles = {name: exporter.obstacle(model) for name, exporter in _EXPORTERS.items()}
    for name, exporter in _EXPORTERS.items():
        if obstacles[name] is None and exporter.question not in answers:
            answers[exporter.question] = exporter.supports(model)
    return {name: obstacles[name] or answers[exporter.question] for name, exporter in _EXPORTERS.items()}


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        folder: where it is.
        notes: descriptions of the files and of the rewrites.
        verification: the result of reading it with its target program.
    """

    folder: Path
    notes: list[str]
    verification: Verification


def write(
    model: Any,
    folder: str | Path,
    to: str = "transformers",
    *,
    exporter: Exporter | None = None,
    tokenizer: Any = None,
) -> Export:
    """Write a sparse language model for another program, and compare what that program computes.

    The folder appears once the comparison has succeeded; nothing is left of an export that is refused or fails.

    Args:
        model: what `sparsify` or `load` returned, or an MoE model of transformers; it is not changed.
        folder: must not exist, or be empty.
        to: the name of an exporter, see `exporters()`; `verify` finds it by this name.
        exporter: an exporter with other settings, such as `GgufFile("q8_0")`.
        tokenizer: of transformers, written beside the model; needed by targets that put it into the same file.

    Raises:
        ValueError: the target cannot express the model exactly, or computes something else.
        FileExistsError: the folder has files.
        ImportError: the target's library is missing.
        OSError: the disk is full, or the folder cannot be written to.
    """
    exporter = find_exporter(to) if exporter is None else exporter
    model, folder = model_given(model), path_given(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder, or delete it")
    with _aside(folder) as new:
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        try:
            if reason := exporter.obstacle(model):
                raise Unsupported(reason)
            probe = exporter.probe_of(model)
            notes = exporter.write(model, new)
        except Unsupported as error:
            raise ValueError(f"this {type(model).__name__} cannot be exported to {to}: {error}") from error
        verification = exporter.verify(new, probe)
        record = {"moeify": __version__, "to": to, "notes": notes, "verification": str(verification)}
        write_json(new / RECORD, {**record, "probe": probe.to_dict()}, indent=None)
        share_tensors(new)
    return Export(folder, notes, verification)


def verify(folder: str | Path) -> Verification:
    """Read an export with its target program once more, and compare with the logits that were recorded.

    Raises:
        FileNotFoundError: the folder is no export.
        ValueError: the program computes something else, or cannot read it.
    """
    record = read_json(Path(folder) / RECORD)
    exporter = find_exporter(record["to"])
    return exporter.verify(Path(folder), exporter.probe_from_dict(record["probe"]))


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that is renamed to it at the end, or deleted after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}"
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rmdir()
        os.replace(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
