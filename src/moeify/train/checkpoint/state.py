"""Save and load weights, optimizer and scheduler as safetensors and JSON; what cannot be restored is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify import files
from moeify.balance import Control, SparsityTarget
from moeify.files import read_json, read_tensors, write_tensors
from moeify.origin import Origin
from moeify.parallel.moving import to_slots
from moeify.parallel.shard import names_in_one_process
from moeify.store import load_weights, save
from moeify.store.reading import Weights
from moeify.store.weights import persistent, refuse_unlike, ties_of, ties_to_stored, write_weights
from moeify.train.checkpoint.adapters import WEIGHTS as ADAPTERS
from moeify.train.checkpoint.adapters import load_adapters, save_adapters, saves_adapters
from moeify.train.checkpoint.shards import MODEL, is_sharded
from moeify.train.checkpoint.stored import Stored

OPTIMIZER = "optimizer"
BALANCE, SPARSE, SCHEDULER = "balance.safetensors", "sparse.safetensors", "scheduler.json"
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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name, sharded or not; tied ones once."""
    own = named_tensors(model)
    return {name: own[name] for name in own.keys() - ties_of(own).keys()}


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers by the names that they have in one process, tied ones under all names."""
    plain = names_in_one_process(model)
    return {plain.get(name, name): tensor for name, tensor in persistent(model).items()}


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    plain = names_in_one_process(model)
    return {plain[name]: parameter for name, parameter in model.named_parameters()}


def _names(model: nn.Module) -> dict[int, str]:
    """The names of parameters in one process, by their identity."""
    return {id(parameter): name for name, parameter in _named_parameters(model).items()}


def load_model(model: nn.Module, folder: Path) -> None:
    """Read the weights of a checkpoint, on however many processes it was saved: all that training changed, or none.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: damaged weights, or those of another model.
    """
    if is_sharded(model) or (folder / MODEL).is_dir():
        assign(model, fitting(model, folder))
    elif saves_adapters(model):
        load_adapters(model, folder)
    else:
        load_weights(model, folder)


def fitting(model: nn.Module, folder: Path) -> Stored:
    """The weights of a checkpoint, sharded or not, whose names, shapes and dtypes are those of a model.

    Raises:
        FileNotFoundError: no weights in the folder.
        ValueError: damaged weights, or those of another model; the message names them.
    """
    if not (folder / MODEL).is_dir() and (folder / ADAPTERS).exists():
        raise ValueError(
            f"{folder} holds the adapters of a model that was not sharded, and this one is: resume it without FSDP, or "
            "begin anew from the adapters"
        )
    stored, own = Stored.of_model(folder), named_tensors(model)
    shapes = {name: stored.shape(name) for name in stored.pieces}
    refuse_unlike(Weights(folder, shapes, stored.dtypes, {}, {}), model, own, ties_to_stored(own, shapes))
    cast = [
        f"{name} is {stored.dtypes[name]}, the model needs {own[name].dtype}"
        for name in sorted(shapes)
        if isinstance(own[name], nn.Parameter) and stored.dtypes[name] != own[name].dtype
    ]
    if cast:
        raise ValueError(f"{folder} holds parameters of another dtype: {'; '.join(cast[:3])}; cast the model first")
    return stored


def assign(model: nn.Module, stored: Stored) -> None:
    """Fill what this process holds of the tensors of a model, by name and index, with weights that are `fitting`."""
    own = named_tensors(model)
    for name in stored.pieces:
        if not isinstance(own[name], nn.Parameter):  # a controller may have made it fp32
            own[name].data = own[name].data.to(stored.dtypes[name])
    filled = {name: own[name] for name in stored.pieces}
    stored.read_into(filled)
    if is_sharded(model):
        to_slots(model, filled)


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write an optimizer's state by parameter name: tensors to safetensors, numbers to JSON.

    Raises:
        TypeError: the state holds a value that is neither a tensor nor a number.
    """
    tensors, numbers = optimizer_state(optimizer, model)
    copies = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_tensors(folder / f"{OPTIMIZER}.safetensors", copies)
    write_json(folder / f"{OPTIMIZER}.json", numbers)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state by parameter name: its tensors, and what JSON holds of it.

    Raises:
        TypeError: a state that is sharded otherwise than its parameter.
    """
    names = _names(model)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, DTensor) and value.shape != parameter.shape:
                raise TypeError(
                    f"{type(optimizer).__name__} keeps a sharded {key} of another shape than {name}, which checkpoints "
                    "cannot hold; use an optimizer whose state has the shape of the parameters, such as AdamW"
                )
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value.detach()
            else:
                numbers.setdefault(name, {})[key] = value
    named = [g | {"params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    groups = [dict(sorted(group.items())) for group in named]  # a resumed optimizer has them in another order
    return tensors, {"state": numbers, "groups": groups}


def refuse_frozen(model: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint whose run trained parameters that this one freezes, before anything is assigned.

    Raises:
        ValueError: there is such a parameter.
    """
    file = folder / f"{OPTIMIZER}.json"
    if not file.is_file():
        return
    frozen = {name for name, parameter in _named_parameters(model).items() if not parameter.requires_grad}
    if any(name in frozen for group in read_json(file)["groups"] for name in group["params"]):
        raise ValueError(_OTHER_PARAMETERS.format(folder))


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Read an optimizer's state back, by however many processes it was saved and in whatever groups.

    Raises:
        ValueError: the optimizer holds other parameters than when it was saved, or groups some whose settings differ.
    """
    saved, stored, order, groups = _fitting(optimizer, model, folder)
    own = _named_parameters(model)
    tensors = {key: _room(own[key.rpartition("|")[0]], stored, key) for key in stored.pieces}
    stored.read_into(tensors)
    if is_sharded(model):
        to_slots(model, tensors)
    state: dict[str, dict[str, Any]] = saved["state"]
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("|")
        state.setdefault(name, {})[kind] = tensor
    place = {name: i for i, name in enumerate(order)}
    optimizer.load_state_dict({"state": {place[name]: s for name, s in state.items()}, "param_groups": groups})


def require_fitting(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Raise what `load_optimizer` would, before anything is assigned."""
    _fitting(optimizer, model, folder)


def _fitting(
    optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path
) -> tuple[dict[str, Any], Stored, list[str], list[dict[str, Any]]]:
    """The saved numbers, the saved tensors, the order of parameters, and the groups that an optimizer is to have."""
    saved = read_json(folder / f"{OPTIMIZER}.json")
    names = _names(model)
    settings = {name: group for group in saved["groups"] for name in group["params"]}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    stored = Stored.of_optimizer(folder)
    if settings.keys() != set(order) or not {key.rpartition("|")[0] for key in stored.pieces} <= set(order):
        raise ValueError(_OTHER_PARAMETERS.format(folder))
    groups, start = [], 0
    for live in optimizer.param_groups:
        theirs = [_without(settings[names[id(p)]], "params") for p in live["params"]] or [_without(live, "params")]
        if any(other != theirs[0] for other in theirs):
            raise ValueError(_OTHER_PARAMETERS.format(folder))
        stop = start + len(live["params"])
        groups.append({k: _as(v, live.get(k)) for k, v in theirs[0].items()} | {"params": list(range(start, stop))})
        start = stop
    return saved, stored, order, groups


def _room(parameter: nn.Parameter, stored: Stored, key: str) -> Tensor:
    """An empty tensor for a state of a parameter, sharded as the parameter if it has its shape."""
    shape, dtype = stored.shape(key), stored.dtypes[key]
    if shape and shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def load_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Read the state of a scheduler back, whose rates are those of the optimizer's groups; groups may be others now."""
    saved = read_json(folder / SCHEDULER)
    group_of = {n: i for i, g in enumerate(read_json(folder / f"{OPTIMIZER}.json")["groups"]) for n in g["params"]}
    names = _names(model)
    first = [next((group_of[names[id(p)]] for p in group["params"]), 0) for group in optimizer.param_groups]
    scheduler.load_state_dict(_regrouped(saved, first))


def _regrouped(state: dict[str, Any], groups: list[int]) -> dict[str, Any]:
    """The state of a scheduler with the rates of other groups, each that of one of the saved groups."""
    return {
        key: [value[i] for i in groups]
        if key in ("base_lrs", "_last_lr", "lr_lambdas")
        else [_regrouped(each, groups) for each in value]
        if key == "_schedulers"
        else value
        for key, value in state.items()
    }


def _without(group: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != key}


def save_balance(control: Control | None, targets: Sequence[SparsityTarget], folder: Path) -> None:
    """Write the state of controllers between steps, without the biases, which the model holds."""
    write_tensors(folder / BALANCE, balance_state(control, targets))


def balance_state(control: Control | None, targets: Sequence[SparsityTarget]) -> dict[str, Tensor]:
    """The state of controllers between steps, without the biases, which the model holds."""
    memory = {} if control is None else control.memory
    tensors = {f"{layer}|{key}": value.cpu() for layer, kept in memory.items() for key, value in kept.items()}
    weights = torch.tensor([target.value for target in targets], dtype=torch.float64)
    return tensors | {"weights": weights}


def load_balance(control: Control | None, targets: Sequence[SparsityTarget], folder: Path) -> None:
    """Read the state of controllers back.

    Raises:
        ValueError: the run was saved with another number of loss weights that adapt.
    """
    set_balance_state(control, targets, read_tensors(folder / BALANCE), f"the checkpoint {folder}")


def set_balance_state(
    control: Control | None, targets: Sequence[SparsityTarget], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Give controllers the state that `balance_state` returned.

    Args:
        control: whose memory is replaced, if any.
        targets: whose weights are set.
        tensors: the state.
        source: where it comes from, for the error.

    Raises:
        ValueError: it is that of another number of loss weights that adapt.
    """
    weights = tensors["weights"].tolist()
    if len(weights) != len(targets):
        raise ValueError(
            f"{source} holds {len(weights)} adaptive loss weights, and this run has {len(targets)}; "
            "give SparseArguments(losses=...) the SparsityTargets that the run began with"
        )
    for target, value in zip(targets, weights, strict=True):
        target.value = value
    if control is not None:
        control.memory = {}
        for name, value in tensors.items():
            if name == "weights":
                continue
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
