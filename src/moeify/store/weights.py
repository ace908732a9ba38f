"""Write the tensors of a model to disk, assign stored tensors to a model, and resolve tied tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moeify.files import write_json, write_tensors
from moeify.progress import with_progress
from moeify.store.dtypes import fits
from moeify.store.reading import INDEX, Weights, open_weights


def write_weights(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str = "5GB") -> list[Path]:
    """Write tensors in the format of `from_pretrained`; equal tensors give equal bytes.

    Args:
        tensors: tensors by name; tied ones are written once, see `ties_of`.
        folder: a folder without old weights (see `moeify.store.hashes.saving`), created if missing.
        max_shard_size: maximal size of a file; larger models are sharded, with an index.

    Returns:
        The paths of the files.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    ready = _without_overlap({name: tensors[name] for name in tensors.keys() - ties_of(tensors).keys()})
    split = split_torch_state_dict_into_shards(ready, max_shard_size=max_shard_size)
    for file, names in with_progress(list(split.filename_to_tensors.items()), "writing weights"):
        write_tensors(folder / file, {name: ready[name] for name in names})
    written = [folder / file for file in split.filename_to_tensors]
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        written.append(folder / INDEX)
    return written


def ties_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Tied tensors: each name whose tensor has an earlier name too, with that earlier name."""
    first: dict[tuple, str] = {}
    return {
        name: kept for name, tensor in tensors.items() if (kept := first.setdefault(_identity(tensor), name)) != name
    }


def _identity(tensor: Tensor) -> tuple:
    if tensor.is_meta or not tensor.data_ptr():  # an empty tensor, or one that is sharded over processes
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _without_overlap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors sorted by name, with copies of those that share a storage with an earlier one."""
    used: set[int] = set()
    ready = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in used and storage else tensor
        used.add(storage)
    return ready


def put_into(weights: Weights, model: nn.Module, ties: Mapping[str, str] | None = None) -> None:
    """Replace the tensors of a model, which may be on the meta device, by those of open files; in place.

    Args:
        weights: the open weights.
        model: a model with tensors of the same names and shapes.
        ties: tied names, each with the name of the stored tensor; None for the ties of the model.

    Raises:
        ValueError: as `refuse_unlike`; the model is unchanged.
    """
    own = persistent(model)
    ties = ties_to_stored(own, weights.shapes) if ties is None else ties
    refuse_unlike(weights, model, own, ties)
    names: dict[str, list[str]] = {name: [name] for name in weights.shapes}
    for name, kept in ties.items():
        if name in own:
            names[kept].append(name)
    for stored, tensor in weights.read():
        old = own[stored]
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        vars(new).update(vars(old))
        for name in names[stored]:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, new)


def refuse_unlike(weights: Weights, model: nn.Module, own: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    """Compare names, shapes and dtypes of stored tensors with those of a model; dtypes must match as in `fits`.

    Args:
        weights: the headers of the stored tensors.
        model: the model, for error messages.
        own: its parameters and persistent buffers.
        ties: tied names, each with the name of the stored tensor.

    Raises:
        ValueError: tensors that are missing, unexpected, or of another shape or dtype; the message names them.
    """
    missing = [name for name in own if ties.get(name, name) not in weights.shapes]
    unexpected = [name for name in weights.shapes if name not in own]
    misshapen = [
        f"{name} is {weights.shapes[name]}, the model needs {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights.shapes and weights.shapes[name] != tuple(tensor.shape)
    ]
    of_another_dtype = [
        f"{name} is {weights.dtypes[name] or 'of an unknown dtype'}, the model needs {tensor.dtype}"
        for name, tensor in own.items()
        if name in weights.shapes and not fits(tensor.dtype, weights.dtypes[name])
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
            f"the weights in {weights.folder} are not those of this {type(model).__name__}; {'; '.join(faults)}"
        )


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load weights into a model with the same tensors; parameters are cast to the dtype of the file.

    Nothing is assigned unless all tensors match. Of tied parameters, one must be in the files.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: files that are damaged, changed or outside the folder; tensors that are missing, unexpected or
            of another shape or dtype; two tensors that differ, for parameters that are tied in the model.
    """
    with open_weights(Path(folder)) as weights, torch.no_grad():
        own = persistent(model)
        refuse_unlike(weights, model, own, ties_to_stored(own, weights.shapes))
        _refuse_untied(model, own, weights)
        for name, tensor in weights.read():
            own[name].data = own[name].data.to(tensor.dtype)
            own[name].data.copy_(tensor)


def ties_to_stored(own: Mapping[str, Tensor], names: Container[str]) -> dict[str, str]:
    """For every tied tensor that is not stored under its own name, the name under which it is stored."""
    stored = {_identity(tensor): name for name, tensor in own.items() if name in names}
    return {
        name: stored[_identity(tensor)]
        for name, tensor in own.items()
        if name not in names and _identity(tensor) in stored
    }


def _refuse_untied(model: nn.Module, own: Mapping[str, Tensor], weights: Weights) -> None:
    twice = ties_of({name: own[name] for name in weights.shapes})
    for name, other in twice.items():
        if not torch.equal(weights.tensor(name), weights.tensor(other)):
            raise ValueError(
                f"{name} and {other} are tied in this {type(model).__name__} and differ in {weights.folder}; give "
                "one of them a parameter of its own before loading (moeify.load does)"
            )


def persistent(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model, tied ones under all their names."""
    return {name: kept for name, kept in model.state_dict(keep_vars=True).items() if isinstance(kept, Tensor)}
