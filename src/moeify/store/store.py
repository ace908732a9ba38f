"""Sparse models on disk: safetensors and a `config.json` that holds the recipe. Nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from moeify.compress.quantize import quantization_of, quantize_as
from moeify.files import read_json, read_tensors, write_json
from moeify.origin import Origin
from moeify.sparsify.convert import sparsify
from moeify.sparsify.recipe import Recipe
from moeify.store.peft import has_adapters
from moeify.version import __version__

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def save(model: nn.Module, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
    """Write a sparsified or quantised model: its weights, and how to build it again.

    Args:
        model: what `sparsify`, `quantize_experts` or `fast_decode` returned.
        folder: made if it is not there.
        max_shard_size: weights beyond this size are spread over several files.

    Raises:
        ValueError: the model was not made by `sparsify`, has adapters of PEFT, or its recipe has a part that no file
            can name.
    """
    from huggingface_hub import save_torch_state_dict

    if has_adapters(model):
        raise ValueError(
            f"this {type(model).__name__} has adapters of PEFT, which are files of their own: model.save_pretrained("
            "folder) writes them, and save(model.merge_and_unload(), folder) the model with the adapters merged in"
        )
    recipe, quantization = Origin.of(model).recipe, quantization_of(model)
    if recipe is None and not quantization:
        raise ValueError(f"this {type(model).__name__} was not made by moeify.sparsify, so its recipe is not known")
    description = {"moeify": __version__, "recipe": recipe and recipe.to_dict(), "model": _describe(model)}
    if quantization:
        description["quantization"] = quantization
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), *folder.glob(_INDEX)]:
        old.unlink()
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    write_json(folder / "config.json", description)


def _describe(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if config is None:
        return {"class": f"{type(model).__module__}.{type(model).__qualname__}"}
    return {"class": f"transformers.{type(model).__name__}", "config": config.to_dict()}


def load(folder: str | Path, model: nn.Module | None = None, recipe: Recipe | None = None) -> nn.Module:
    """Build a saved sparse model again.

    Args:
        folder: what `save` wrote.
        model: the dense model to start from (its weights do not matter); needed for models that are not of
            transformers.
        recipe: used in place of the saved one, for recipes with parts of your own.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a damaged checkpoint, or one of another model; the message names the tensors.
    """
    folder = Path(folder)
    description = _read_json(folder / "config.json")
    quantization = description.get("quantization", [])
    for key, kind in (("moeify", str), ("recipe", (dict, NoneType) if quantization else dict), ("model", dict)):
        if not isinstance(description.get(key), kind):
            raise ValueError(f"{folder / 'config.json'} has no {key!r}: it was not written by moeify.store.save")
    if recipe is None and description["recipe"] is not None:
        recipe = Recipe.from_dict(description["recipe"])
    if model is None:
        model = _build(description["model"], folder)
    if recipe is not None:
        sparsify(model, recipe, verbose=False, allow_noncausal=True)  # whoever saved it allowed it
    quantize_as(model, quantization)
    load_weights(model, folder)
    return model.eval()


def _build(description: dict[str, Any], folder: Path) -> nn.Module:
    import transformers

    saved = str(description.get("class"))
    name = saved.removeprefix("transformers.")
    architecture = getattr(transformers, name, None) if "config" in description else None
    known = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    if not known or architecture.config_class is None:
        raise ValueError(
            f"{folder} holds a {saved}, which is not a model of transformers; build the dense model "
            "yourself and pass it: load(folder, model=...)"
        )
    return architecture(architecture.config_class.from_dict(description["config"]))


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Read weights into a model of exactly the same tensors; parameters take the dtype of the file.

    Nothing is assigned unless everything fits. Tied parameters need to be in the files once.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: files that are damaged or lie outside the folder; tensors that are missing, unexpected or of
            another shape.
    """
    folder = Path(folder)
    loaded = _read_tensors(folder)
    own = {**dict(model.named_parameters(remove_duplicate=False)), **_persistent_buffers(model)}
    present = {id(tensor) for name, tensor in own.items() if name in loaded}  # tied ones are one object
    missing = [name for name, tensor in own.items() if id(tensor) not in present]
    unexpected = [name for name in loaded if name not in own]
    misshapen = [
        f"{name} is {tuple(loaded[name].shape)}, the model needs {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in loaded and loaded[name].shape != tensor.shape
    ]
    faults = [
        f"{fault}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for fault, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if faults:
        raise ValueError(f"the weights in {folder} are not those of this {type(model).__name__}; {'; '.join(faults)}")
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].data = own[name].data.to(tensor.dtype)
            own[name].data.copy_(tensor)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in kept}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors.update(read_tensors(path))
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint: those that its index names, or the only one.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index is damaged or names a file outside the folder.
    """
    files = _listed(folder / _INDEX) if (folder / _INDEX).is_file() else [_WEIGHTS]
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"the checkpoint {folder} has no file {file}")
    return [folder / file for file in files]


def _listed(index: Path) -> list[str]:
    """The files that an index names, all in its own folder."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index} has no 'weight_map' from tensors to files")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index} names the file {file!r}, which is outside the checkpoint folder")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}: it is not a checkpoint of moeify")
    return read_json(path)
