"""Weights on disk: safetensors files of one folder, each tensor in them once, and which names mean the same tensor."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeify.files import open_tensors, read_json, write_json, write_tensors
from moeify.folders import finish
from moeify.store.dtypes import dtype_of, fits
from moeify.store.hashes import check

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_weights(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str = "5GB") -> list[Path]:
    """Write tensors as `from_pretrained` reads them; equal tensors give equal bytes.

    Args:
        tensors: by name; those that share memory with an earlier one in full are left out, see `ties_of`.
        folder: without weights of before (see `moeify.store.hashes.saving`), made if it is not there.
        max_shard_size: what a file holds at most; beyond it there are several, and an index.

    Returns:
        The files.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    ready = _without_overlap({name: tensors[name] for name in tensors.keys() - ties_of(tensors).keys()})
    split = split_torch_state_dict_into_shards(ready, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: ready[name] for name in names})
    written = [folder / file for file in split.filename_to_tensors]
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        written.append(folder / INDEX)
    return written


def ties_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that are an earlier one under another name, and the name of that one."""
    first: dict[tuple, str] = {}
    return {
        name: kept for name, tensor in tensors.items() if (kept := first.setdefault(_identity(tensor), name)) != name
    }


def _identity(tensor: Tensor) -> tuple:
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _without_overlap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two lie in the same memory, in the order of their names."""
    used: set[int] = set()
    ready = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in used and storage else tensor
        used.add(storage)
    return ready


@dataclass(frozen=True)
class Weights:
    """The weights of a folder, of which only the headers are read so far.

    Attributes:
        folder: where they are.
        shapes: of every tensor.
        dtypes: of every tensor; None for those that are not known.
        files: the file of every tensor.
    """

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]
    files: dict[str, Path]

    @classmethod
    def of(cls, folder: str | Path) -> Weights:
        """Read the headers of a folder's weights.

        Raises:
            FileNotFoundError: no weights in the folder.
            ValueError: files that are damaged or lie outside the folder.
        """
        folder = Path(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype | None] = {}
        files: dict[str, Path] = {}
        for file in weight_files(folder):
            with open_tensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                    header = tensors.get_slice(name)
                    shapes[name], dtypes[name] = tuple(header.get_shape()), dtype_of(header.get_dtype())
                    files[name] = file
        return cls(folder, shapes, dtypes, files)

    def check(self) -> None:
        """Compare the files with the hashes beside them, if there are any.

        Raises:
            ValueError: a file was damaged or changed since it was saved.
        """
        index = self.folder / INDEX
        check(self.folder, [*dict.fromkeys(self.files.values()), *([index] if os.path.lexists(index) else [])])

    def put_into(self, model: nn.Module, ties: Mapping[str, str] | None = None) -> None:
        """Put the tensors in the places of a model's own, which may have no memory; in place.

        Args:
            model: a model of tensors of the same names and shapes.
            ties: names that mean the tensor of another name; None for those that the model ties.

        Raises:
            ValueError: whatever `refuse_unlike` raises; the model is as it was.
        """
        own = persistent(model)
        ties = ties_to_stored(own, self.shapes) if ties is None else ties
        self.refuse_unlike(model, own, ties)
        names: dict[str, list[str]] = {name: [name] for name in self.shapes}
        for name, kept in ties.items():
            if name in own:
                names[kept].append(name)
        for stored, tensor in self.read():
            old = own[stored]
            new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            vars(new).update(vars(old))
            for name in names[stored]:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, new)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one at a time, in memory of its own."""
        for file in dict.fromkeys(self.files.values()):
            with open_tensors(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name).clone()

    def refuse_unlike(self, model: nn.Module, own: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
        """Compare names, shapes and dtypes with a model's; one dtype of ordinary weights may stand for another.

        Args:
            model: for the message.
            own: its parameters and persistent buffers.
            ties: names that mean the tensor of another name.

        Raises:
            ValueError: tensors that are missing, unexpected, or of another shape or dtype; the message names them.
        """
        missing = [name for name in own if ties.get(name, name) not in self.shapes]
        unexpected = [name for name in self.shapes if name not in own]
        misshapen = [
            f"{name} is {self.shapes[name]}, the model needs {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in self.shapes and self.shapes[name] != tuple(tensor.shape)
        ]
        of_another_dtype = [
            f"{name} is {self.dtypes[name] or 'of an unknown dtype'}, the model needs {tensor.dtype}"
            for name, tensor in own.items()
            if name in self.shapes and not fits(tensor.dtype, self.dtypes[name])
        ]
        faults = [
            f"{fault}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for fault, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("wrong shape", misshapen),
                ("wrong dtype", of_another_dtype),
            )
            if names
        ]
        if faults:
            raise ValueError(
                f"the weights in {self.folder} are not those of this {type(model).__name__}; {'; '.join(faults)}"
            )


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Read weights into a model of exactly the same tensors; parameters take the dtype of the file.

    Nothing is assigned unless everything fits. Tied parameters need to be in the files once.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: files that are damaged, changed or lie outside the folder; tensors that are missing, unexpected or
            of another shape or dtype; two tensors that differ, for parameters that are tied in the model.
    """
    finish(Path(folder))
    weights = Weights.of(folder)
    own = persistent(model)
    ties = ties_to_stored(own, weights.shapes)
    weights.refuse_unlike(model, own, ties)
    weights.check()
    _refuse_untied(model, own, weights)
    with torch.no_grad():
        for name, tensor in weights.read():
            own[name].data = own[name].data.to(tensor.dtype)
            own[name].data.copy_(tensor)


def ties_to_stored(own: Mapping[str, Tensor], names: Container[str]) -> dict[str, str]:
    """For every tensor that the files lack, the name under which they have it."""
    stored = {_identity(tensor): name for name, tensor in own.items() if name in names}
    return {
        name: stored[_identity(tensor)]
        for name, tensor in own.items()
        if name not in names and _identity(tensor) in stored
    }


def _refuse_untied(model: nn.Module, own: Mapping[str, Tensor], weights: Weights) -> None:
    twice = ties_of({name: own[name] for name in weights.shapes})
    needed = {*twice, *twice.values()}
    values = {name: tensor for name, tensor in weights.read() if name in needed} if twice else {}
    for name, other in twice.items():
        if not torch.equal(values[name], values[other]):
            raise ValueError(
                f"{name} and {other} are tied in this {type(model).__name__} and differ in {weights.folder}; give "
                "one of them a parameter of its own before loading (moeify.load does)"
            )


def persistent(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model that are saved, under every name that they have."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: those that its index names, or the only one.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index is damaged or names a file outside the folder.
    """
    files = _listed(folder / INDEX) if os.path.lexists(folder / INDEX) else [WEIGHTS]
    for file in files:
        if not os.path.lexists(folder / file):
            raise FileNotFoundError(f"the checkpoint {folder} has no file {file}")
    return [folder / file for file in files]


def _listed(index: Path) -> list[str]:
    """The files that an index names, all in its own folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no 'weight_map' from tensors to files")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index} names the file {file!r}, which is outside the checkpoint folder")
    return files
