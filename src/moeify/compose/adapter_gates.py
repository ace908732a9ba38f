"""PHATGOOSE's gates of adapters: saved beside each adapter, one vector per linear layer, and set as rows of routers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.files import hashes_of, read_tensors, unchanged, write_tensors
from moeify.folders import finish
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.routers.phatgoose import Phatgoose
from moeify.store.dtypes import REAL
from moeify.store.hashes import saving

FILE = "gates.safetensors"

Gates = Mapping[str, Float[Tensor, "D"]]
"""The gate of one adapter: the name of every linear layer that it adapts -> a vector of its width."""


def save_gates(gates: Gates, folder: str | Path) -> None:
    """Write the gate of one adapter to `gates.safetensors`, in the folder of the adapter, with its hash.

    Raises:
        OSError: the disk is full, the folder cannot be written to, or another process is saving into it.
    """
    with saving(folder, keep=True) as stage:
        write_tensors(stage.new / FILE, gates)


def load_gates(folder: str | Path) -> dict[str, Float[Tensor, "D"]]:
    """Read the gate of one adapter.

    Raises:
        FileNotFoundError: the folder has no gate.
        ValueError: a damaged file, or one with something else than vectors.
        OSError: it cannot be read.
    """
    path = Path(folder) / FILE
    finish(path.parent)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} does not exist; make it with train_gates and save_gates")
    saved = hashes_of(path.parent) or {}
    if FILE in saved:
        unchanged(path, saved)
    gates = read_tensors(path)
    for name, gate in gates.items():
        if gate.dim() != 1 or gate.dtype not in REAL:
            raise ValueError(f"{path} has {gate.dtype} {tuple(gate.shape)} for {name}; a gate is a vector of weights")
    return gates


@torch.no_grad()
def set_gates(model: nn.Module, gates: Sequence[Gates]) -> None:
    """Set the rows of the `Phatgoose` routers of a model to the gates of its adapters, in the order of its experts.

    Args:
        model: with `Phatgoose` routers.
        gates: the gate of every adapter.

    Raises:
        ValueError: no such router; not one gate per expert; a gate without a vector, or with one of another width, for
            one of the layers. Nothing is changed then.
    """
    layers = {name: layer for name, layer in moe_layers(model).items() if isinstance(layer.router, Phatgoose)}
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no Phatgoose router to put gates into")
    rows = {layer: _rows(name, layer, gates) for name, layer in layers.items()}
    for layer, vectors in rows.items():
        layer.router.get_parameter("weight").copy_(vectors)


def _rows(name: str, layer: MoE, gates: Sequence[Gates]) -> Float[Tensor, "E D"]:
    weight = layer.router.get_parameter("weight")
    if len(gates) != len(weight):
        raise ValueError(
            f"{len(gates)} gates for the {len(weight)} experts of {name}; give one gate per expert, in order"
        )
    for number, gate in enumerate(gates):
        if name not in gate:
            raise ValueError(f"gate {number} has no vector for {name}; train it on a model adapted in the same places")
        if gate[name].shape != weight.shape[1:]:
            raise ValueError(
                f"gate {number} is {tuple(gate[name].shape)} in {name}, where tokens are {weight.shape[1]} wide"
            )
    return torch.stack([gate[name].to(weight) for gate in gates])
