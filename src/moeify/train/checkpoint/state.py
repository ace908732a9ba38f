"""Save and load weights, optimizer and scheduler as safetensors and JSON; what cannot be restored is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify import files
from moeify.balance import Control, SparsityTarget
from moeify.files import read_json, read_tensors, write_tensors
from moeify.origin import Origin
from moeify.store import load_weights, save
from moeify.store.weights import write_weights
from moeify.train.checkpoint.adapters import load_adapters, save_adapters, saves_adapters

OPTIMIZER = "optimizer"
BALANCE = "balance.safetensors"
_OTHER_PARAMETERS = (
    "the optimizer groups other parameters than the checkpoint {}; freeze and group them as they were when it was saved"
)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write all parameters and buffers under the names they have in the model, so that loading restores them all.

    A model made by `moeify.sparsify` is written so that `moeify.store.load` reads it; one of transformers so that
    `from_pretrained` does; of a `PeftModel`, the adapters as PEFT does, and what else is trained. If a recipe has parts
    that no file can name, only the weights are written.
    """
    if saves_adapters(model):
        return save_adapters(model, folder)
    if Origin.of(model).recipe is not None:
        try:
            return save(model, folder)
        except ValueError as error:
            print(f"moeify: checkpoints of this model can be resumed from, but not loaded by themselves: {error}")
    write_weights(model.state_dict(), folder)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
    return None


def load_model(model: nn.Module, folder: Path) -> None:
    """Read the weights that `save_weights` wrote: every tensor that training may have changed, or none.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: damaged weights, or those of another model.
    """
    if saves_adapters(model):
        load_adapters(model, folder)
    else:
        load_weights(model, folder)


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write an optimizer's state by parameter name: tensors to safetensors, numbers to JSON.

    Raises:
        TypeError: the state holds a value that is neither a tensor nor a number.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value.detach().cpu().contiguous().clone()
            else:
                numbers.setdefault(name, {})[key] = value
    groups = [g | {"params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    write_tensors(folder / f"{OPTIMIZER}.safetensors", tensors)
    write_json(folder / f"{OPTIMIZER}.json", {"state": numbers, "groups": groups})


def refuse_frozen(model: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint whose run trained parameters that this one freezes, before anything is assigned.

    Raises:
        ValueError: there is such a parameter.
    """
    file = folder / f"{OPTIMIZER}.json"
    if not file.is_file():
        return
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if any(name in frozen for group in read_json(file)["groups"] for name in group["params"]):
        raise ValueError(_OTHER_PARAMETERS.format(folder))


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Read an optimizer's state back.

    Raises:
        ValueError: the optimizer's groups hold other parameters than when it was saved.
    """
    saved = read_json(folder / f"{OPTIMIZER}.json")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if [name for group in saved["groups"] for name in group["params"]] != order:
        raise ValueError(_OTHER_PARAMETERS.format(folder))
    state: dict[str, dict[str, Any]] = saved["state"]
    for key, tensor in read_tensors(folder / f"{OPTIMIZER}.safetensors").items():
        name, _, kind = key.rpartition("|")
        state.setdefault(name, {})[kind] = tensor
    place = {name: i for i, name in enumerate(order)}
    groups, start = [], 0
    for live, group in zip(optimizer.param_groups, saved["groups"], strict=True):
        stop = start + len(live["params"])
        groups.append({k: _as(v, live.get(k)) for k, v in group.items()} | {"params": list(range(start, stop))})
        start = stop
    optimizer.load_state_dict({"state": {place[name]: s for name, s in state.items()}, "param_groups": groups})


def save_balance(control: Control | None, targets: Sequence[SparsityTarget], folder: Path) -> None:
    """Write the state of controllers between steps, without the biases, which the model holds."""
    memory = {} if control is None else control.memory
    tensors = {f"{layer}|{key}": value.cpu() for layer, kept in memory.items() for key, value in kept.items()}
    weights = torch.tensor([target.value for target in targets], dtype=torch.float64)
    write_tensors(folder / BALANCE, tensors | {"weights": weights})


def load_balance(control: Control | None, targets: Sequence[SparsityTarget], folder: Path) -> None:
    """Read the state of controllers back.

    Raises:
        ValueError: the run was saved with another number of loss weights that adapt.
    """
    tensors = read_tensors(folder / BALANCE)
    weights = tensors.pop("weights").tolist()
    if len(weights) != len(targets):
        raise ValueError(
            f"the checkpoint {folder} holds {len(weights)} adaptive loss weights, and this run has {len(targets)}; "
            "give SparseArguments(losses=...) the SparsityTargets that the run began with"
        )
    for target, value in zip(targets, weights, strict=True):
        target.value = value
    if control is not None:
        control.memory = {}
        for name, value in tensors.items():
            layer, _, key = name.rpartition("|")
            control.memory.setdefault(layer, {})[key] = value


def _as(value: Any, live: Any) -> Any:
    """JSON has lists only; betas are a tuple, and a learning rate may be a tensor."""
    if isinstance(live, tuple):
        return tuple(value)
    return torch.tensor(value, dtype=live.dtype) if isinstance(live, Tensor) else value


def write_json(file: Path, value: Any) -> None:
    """Write JSON; single-element tensors become numbers.

    Raises:
        TypeError: a value that JSON cannot hold.
    """

    def number(part: Any) -> Any:
        if isinstance(part, Tensor) and part.numel() == 1:
            return part.item()
        raise TypeError(
            f"cannot save a {type(part).__name__} in {file.name}: checkpoints hold tensors, numbers, strings and lists "
            "of them; pickle is never written"
        )

    files.write_json(file, value, default=number, indent=None)
