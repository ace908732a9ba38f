"""Read a saved folder: each file is compared with its hash in `SHA256.json` before it is read.

Folders without hashes, of earlier versions and of other programs, are read without verification.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.files import hashes_of, open_tensors, read_json, unchanged
from moeify.folders import finish
from moeify.progress import Progress, with_progress
from moeify.store.dtypes import dtype_of

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTERS = "adapter_config.json"  # of PEFT


@dataclass(frozen=True)
class Weights:
    """The weights of a folder: headers are in memory, tensors can be read while the files are open.

    Attributes:
        folder: the folder.
        shapes: the shape of each tensor by name.
        dtypes: the dtype of each tensor; None for an unsupported one.
        files: the file of each tensor.
        opened: open files by path, from `moeify.files.open_tensors`.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]
    files: dict[str, Path]
    opened: dict[Path, Any]

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and copies of all tensors; a file is closed after its last one."""
        progress, done = Progress("reading weights", len(self.files)), 0
        for file in self.opened.values():
            with file:
                for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                    yield name, file.get_tensor(name).clone()
                    done += 1
                    progress.at(done, f"{done} of {len(self.files)} tensors")

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor."""
        return self.opened[self.files[name]].get_tensor(name).clone()


@contextmanager
def open_checkpoint(folder: Path) -> Generator[tuple[dict[str, Any], Weights]]:
    """Open a saved model: yields its config and its weights, whose files are open inside the context.

    Raises:
        FileNotFoundError: no config or no weights in the folder, or adapters of PEFT alone.
        ValueError: files that are damaged, changed since they were saved, or outside the folder.
        OSError: a file cannot be read, or an interrupted save cannot be finished.
    """
    finish(folder)
    if not os.path.lexists(folder / CONFIG):
        if (folder / ADAPTERS).exists():
            raise FileNotFoundError(
                f"{folder} holds adapters of PEFT without the model that they change; load that model, and then "
                "PeftModel.from_pretrained(model, folder)"
            )
        raise FileNotFoundError(f"there is no {CONFIG} in {folder}: it is not a checkpoint of moeify")
    saved = hashes_of(folder)
    config = read_json(unchanged(folder / CONFIG, saved))
    with _opened(folder, saved) as weights:
        yield config, weights


@contextmanager
def open_weights(folder: Path) -> Generator[Weights]:
    """Open the weights of a folder, whose files are open inside the context; `open_checkpoint` without a config.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: files that are damaged, changed since they were saved, or outside the folder.
        OSError: a file cannot be read, or an interrupted save cannot be finished.
    """
    finish(folder)
    with _opened(folder, hashes_of(folder)) as weights:
        yield weights


def read_headers(folder: Path) -> Weights:
    """The weights of a folder without open files, of which one at a time was mapped: names, shapes, dtypes and files.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: files that are damaged, changed since they were saved, or outside the folder.
        OSError: a file cannot be read, or an interrupted save cannot be finished.
    """
    finish(folder)
    saved, weights = hashes_of(folder), Weights(folder, {}, {}, {}, {})
    for file in weight_files(folder, saved):
        with open_tensors(unchanged(file, saved)) as tensors:
            _add_headers(weights, file, tensors)
    return weights


@contextmanager
def _opened(folder: Path, saved: Mapping[str, Any] | None) -> Generator[Weights]:
    weights = Weights(folder, {}, {}, {}, {})
    with ExitStack() as closing:
        for file in with_progress(weight_files(folder, saved), "verifying weights"):
            weights.opened[file] = closing.enter_context(open_tensors(unchanged(file, saved)))
            _add_headers(weights, file, weights.opened[file])
        yield weights


def _add_headers(weights: Weights, file: Path, tensors: Any) -> None:
    for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
        header = tensors.get_slice(name)
        weights.shapes[name], weights.dtypes[name] = tuple(header.get_shape()), dtype_of(header.get_dtype())
        weights.files[name] = file


def weight_files(folder: Path, saved: Mapping[str, Any] | None = None) -> list[Path]:
    """The weight files of a checkpoint: those in its index, or `model.safetensors`.

    Args:
        folder: folder of the checkpoint.
        saved: `hashes_of` the folder, to verify the index; None to skip verification.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index is damaged or names a file outside the folder.
    """
    index, names = folder / INDEX, [WEIGHTS]
    if os.path.lexists(index):
        of_tensors = read_json(unchanged(index, saved)).get("weight_map")
        if not isinstance(of_tensors, dict) or not of_tensors or {str} != set(map(type, of_tensors.values())):
            raise ValueError(f"{index} has no 'weight_map' from tensors to files")
        names = sorted(set(of_tensors.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index} names the file {name!r}, which is outside the checkpoint folder")
        if not os.path.lexists(folder / name):
            raise FileNotFoundError(f"the checkpoint {folder} has no file {name}")
    return [folder / name for name in names]
