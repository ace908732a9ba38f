"""`save`: writes a sparse model as a folder of safetensors, a `config.json` and the hashes of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify import ranks
from moeify.compress.quantize import quantization_of
from moeify.files import write_json, write_text
from moeify.given import model_given, path_given
from moeify.origin import Origin
from moeify.parallel.whole import as_in_one_process, is_divided, whole_tensors
from moeify.store.card import NAME as CARD
from moeify.store.card import card, is_own
from moeify.store.config import architecture_of, describe, fold
from moeify.store.hashes import saving
from moeify.store.modelling_file import write_modelling_file
from moeify.store.peft import has_adapters
from moeify.store.reading import CONFIG, GENERATION, INDEX, WEIGHTS, weight_files
from moeify.store.weights import persistent, ties_of, write_weights
from moeify.version import __version__


def save(
    model: nn.Module, folder: str | Path, *, max_shard_size: str = "5GB", notes: Mapping[str, str] | None = None
) -> None:
    """Save a sparse or quantised model: its weights, and the config to build it again.

    For models of transformers a modelling file and a model card are written too; a card that `save` did not write, or
    that was edited, is kept.

    Output is deterministic: the same model is saved as the same bytes. An existing model in the folder is replaced
    atomically: after an interruption, `load` reads either the old or the new model; both are on disk until the save is
    complete. Files that `save` did not write are kept.

    If processes hold parts of the model (`shard`, `distribute`, `spread`, FSDP2), all of them call it together. The
    first gathers and writes the whole model, which its memory must hold, as the same model is saved in one process; an
    error there is one of all processes.

    Args:
        model: a model returned by `sparsify`, `quantize_experts` or `fast_decode`.
        folder: the destination; created if missing.
        max_shard_size: weights beyond this size are sharded over several files.
        notes: additional rows of the model card, such as `{"Data": ..., "Balance": ...}`.

    Raises:
        TypeError: model and folder in the wrong order.
        ValueError: the model was not made by `sparsify`, has adapters of PEFT or a library of adapters (`save_adapters`
            writes that), or its recipe has a component that cannot be serialised.
        OSError: the disk is full, the folder cannot be written to, or another process is saving into it; the folder is
            unchanged.
    """
    model, folder = model_given(model), path_given(folder)
    if has_adapters(model):
        raise ValueError(
            f"this {type(model).__name__} has adapters of PEFT, which are files of their own: model.save_pretrained("
            "folder) writes them, and save(model.merge_and_unload(), folder) the model with the adapters merged in"
        )
    kept = persistent(model)
    if not is_divided(model):
        _write(model, kept, Path(folder), max_shard_size, notes)
        return
    tensors = whole_tensors(model, kept)
    with ranks.saying_together(), as_in_one_process(model):
        if ranks.rank() == 0:
            _write(model, tensors, Path(folder), max_shard_size, notes)


def _write(
    model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str, notes: Mapping[str, str] | None
) -> None:
    origin = Origin.of(model)
    quantization = quantization_of(model)
    if origin.recipe is None and (origin.adapters is not None or not quantization):
        raise ValueError(f"this {type(model).__name__} {_why_no_recipe(origin)}")
    description: dict[str, Any] = {
        "moeify": __version__,
        "recipe": origin.recipe and origin.recipe.to_dict(),
        "model": describe(model),
        "ties": ties_of(tensors),
        "buffers": _buffers(model),
    }
    if quantization:
        description["quantization"] = quantization
    if origin.sites is not None:
        description["sites"] = origin.sites
    description = fold(model, description)
    has_own_card = is_own(folder)
    with saving(folder) as stage:
        write_weights(tensors, stage.new, max_shard_size)
        write_json(stage.new / CONFIG, description)
        if "auto_map" in description:
            _write_for_transformers(model, stage.new, description)
            if has_own_card:
                write_text(stage.new / CARD, card(model, description, notes or {}))
        stage.obsolete -= set() if has_own_card else {CARD}
        stage.obsolete |= _weights_of_before(folder)


def _why_no_recipe(origin: Origin) -> str:
    if origin.adapters is None:
        return "was not made by moeify.sparsify, so its recipe is not known"
    return (
        "has a library of adapters, which no recipe makes: moeify.save_adapters(model, folder) writes them with their "
        "routers, and moeify.load_adapters(base, folder) puts them beside the same base again"
    )


def _write_for_transformers(model: Any, folder: Path, description: dict[str, Any]) -> None:
    """Write the files that only transformers reads: the modelling file and the generation config."""
    write_modelling_file(folder, architecture_of(model), is_plain=description["sparse_layers"] is not None)
    if getattr(model, "generation_config", None) is not None:
        write_text(folder / GENERATION, model.generation_config.to_json_string())


def _weights_of_before(folder: Path) -> set[str]:
    """The names of old weight files in a folder, to be deleted; from the index, as earlier versions wrote no hashes."""
    try:
        return {INDEX, *(file.name for file in weight_files(folder))}
    except (ValueError, OSError):  # no weights, or a damaged index
        return {INDEX, WEIGHTS}


def _buffers(model: nn.Module) -> dict[str, str]:
    """The dtypes of floating-point buffers that are not saved and not in fp32."""
    saved = persistent(model)
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and buffer.dtype != torch.float32
    }
