"""`load`: builds a saved sparse model on the meta device, compares it with the files, and assigns their tensors.

No forward pass is run, and no weights are initialised that the files then replace.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.files import hashes_of, read_json, unchanged
from moeify.given import path_given
from moeify.snapshot import restored_on_error
from moeify.sparsify.recipe import Recipe
from moeify.store.build import build
from moeify.store.reading import GENERATION
from moeify.store.saved import Saved, open_saved
from moeify.store.weights import put_into


def load(folder: str | Path, model: nn.Module | None = None, recipe: Recipe | None = None) -> nn.Module:
    """Load a saved sparse model, with parameters in the dtype of the files, in evaluation mode.

    Args:
        folder: a folder written by `save`.
        model: the dense model to start from, whose weights are discarded; required for models that are not of
            transformers. It is unchanged if the call raises.
        recipe: replaces the saved recipe, for recipes with custom components.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a damaged checkpoint, or one of another model; the message names the file or the tensors.
        OSError: a file cannot be read, or an interrupted save cannot be finished.
    """
    with open_saved(path_given(folder), recipe) as saved:
        if model is None:
            return _loaded(saved)
        return restored_on_error(model, partial(_loaded, saved, model), values=False)


def _loaded(saved: Saved, model: nn.Module | None = None) -> nn.Module:
    built_here = model is None
    with torch.random.fork_rng(devices=[]):
        model = build(saved, model)
    if built_here:
        _read_generation(saved.path.parent, model)
    put_into(saved.weights, model, saved.description.get("ties"))
    return model.eval()


def _read_generation(folder: Path, model: Any) -> None:
    """How the model generates text (lengths, ends, sampling), which its config does not tell."""
    file = folder / GENERATION
    if file.exists() and getattr(model, "generation_config", None) is not None:
        settings = read_json(unchanged(file, hashes_of(folder)))
        model.generation_config = type(model.generation_config).from_dict(settings)
