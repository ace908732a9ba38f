"""`save_sharded` and `load_sharded`: checkpoints in a loop of your own, of models on one process or on many."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moeify import ranks
from moeify.balance import Control
from moeify.files import read_json, read_tensors, write_tensors
from moeify.parallel.moving import in_order
from moeify.parallel.shard import names_in_one_process
from moeify.train.balance_hook import BalanceHook
from moeify.train.checkpoint import state
from moeify.train.checkpoint.folder import checkpoints, fault, newest, recover, rotate, step_of
from moeify.train.checkpoint.shards import MODEL, OPTIMIZER, is_sharded, writable
from moeify.train.checkpoint.together import group_of_checkpoints, warn_of_shared_store, write_together

NUMBERS = "trainer_state.json"


def save_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    control: Control | None = None,
    balance: BalanceHook | None = None,
    numbers: Mapping[str, Any] | None = None,
    background: bool = False,
    keep: int | None = None,
) -> Future[None]:
    """Save a checkpoint by all processes, each of which writes its part; `load_sharded` reads it on any number.

        save_sharded(f"runs/a/checkpoint-{step}", model, optimizer, numbers={"step": step})

    Works with `fully_shard` (FSDP2), experts and other parameters as DTensors, DDP, and in a single process. All
    processes call it together, between two steps. The folder appears under its name once all files of all processes are
    on disk: a kill at any moment leaves the checkpoint before. Files are safetensors and JSON, and a manifest holds the
    SHA-256 of each and the shape and dtype of every tensor.

    Args:
        folder: of the checkpoint, which all processes see; one of this name is replaced. With the name `checkpoint-N`,
            `newest_checkpoint` finds it.
        model: its parameters and persistent buffers.
        optimizer: its state, by the names of parameters.
        scheduler: of learning rates, as torch has them.
        control: the controllers of `moeify.balance.control`; biases are buffers of the model.
        balance: the loads of the last step, and the loss weights that adapt.
        numbers: what else the training needs, as JSON: the step, the seed, the place in the data.
        background: return once the state is copied to the CPU. The next save waits for this one.
        keep: how many of the newest `checkpoint-N` beside this one stay, itself included; None for all. Older ones are
            deleted once this one is complete.

    Returns:
        Done when the checkpoint is complete; its `result()` raises what the background met.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; on all, and the checkpoint before stays.
        ValueError: a parameter that is not sharded differs between processes.
        TypeError: a state of the optimizer, or one of `numbers`, that neither tensors nor JSON hold.
    """
    model, group = _bare(model), group_of_checkpoints()
    tensors, of_groups = (None, {}) if optimizer is None else state.optimizer_state(optimizer, model)
    parts = parts_of(model, tensors, group=group, copy=background)

    def write_others(folder: Path) -> None:
        state.write_json(folder / NUMBERS, dict(numbers or {}))
        if optimizer is not None:
            state.write_json(folder / f"{OPTIMIZER}.json", of_groups)
            state.write_json(folder / state.SCHEDULER, {} if scheduler is None else scheduler.state_dict())
            write_tensors(folder / state.SPARSE, {} if balance is None else balance.loads)
            state.save_balance(control, [] if balance is None else balance.sparse.targets, folder)

    folder = Path(folder)

    def rotate_others() -> None:
        before = [path for path in checkpoints(folder.parent) if path != folder]
        rotate([*reversed(before), folder], keep, None)

    return write_together(folder, parts, write_others, rotate_others, group=group, background=background)


def load_sharded(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    control: Control | None = None,
    balance: BalanceHook | None = None,
) -> dict[str, Any]:
    """Read a checkpoint of `save_sharded` or `SparseTrainer` on any number of processes, and return its `numbers`.

    All processes call it together, with a model that is sharded as it is to be trained, in whatever way. Every file is
    compared with its hash, and every name, shape and dtype with the model's, before anything is assigned.

    Args:
        folder: of the checkpoint.
        model: as for `save_sharded`, and so are the others; those that are None are not restored.
        optimizer: over the same parameters as when it was saved, in whatever groups.
        scheduler: of the same kind.
        control: as it was made for this model.
        balance: the hook of this model; its `step` is for you to set.

    Raises:
        ValueError: a damaged or incomplete checkpoint, or one of another model or optimizer; the message names the
            file, the tensor or the expert.
        FileNotFoundError: there is no optimizer in it, and one was passed.
    """
    folder, model = Path(folder), _bare(model)
    with ranks.saying_together(group_of_checkpoints()):
        if ranks.rank() == 0 and (reason := fault(folder)) is not None:
            raise ValueError(f"{folder} cannot be read: {reason}")
    if optimizer is not None and not (folder / f"{OPTIMIZER}.json").is_file():
        raise FileNotFoundError(f"{folder} holds the model only; pass no optimizer, and begin with a new one")
    weights = state.fitting(model, folder)
    if optimizer is not None:
        state.require_fitting(optimizer, model, folder)
    state.assign(model, weights)
    if optimizer is not None:
        state.load_optimizer(optimizer, model, folder)
    if optimizer is not None and scheduler is not None:
        state.load_scheduler(scheduler, optimizer, model, folder)
    if balance is not None:
        balance.loads = read_tensors(folder / state.SPARSE)
    if control is not None or balance is not None:
        state.load_balance(control, [] if balance is None else balance.sparse.targets, folder)
    return read_json(folder / NUMBERS)


def newest_checkpoint(output: str | Path) -> Path | None:
    """The newest valid `checkpoint-N` in a folder, on all processes the same one; None if there is none at all.

    Finishes or removes what a kill left, so all processes call it together, before the first save.

    Raises:
        FileNotFoundError: there are checkpoints, and none is valid; the message names the reasons.
    """
    warn_of_shared_store()
    output, step, group = Path(output), -1, group_of_checkpoints()
    with ranks.saying_together(group):
        if ranks.rank() == 0:
            recover(output)
            step = step_of(newest(output)) if checkpoints(output) else -1
    step = ranks.gather(step, group)[0]
    return None if step < 0 else output / f"checkpoint-{step}"


def parts_of(
    model: nn.Module, optimizer: Mapping[str, Tensor] | None, *, group: Any = None, copy: bool = False
) -> dict[str, dict[str, Tensor]]:
    """What each process writes of a model, and of an optimizer's tensors if there is one; see `writable`."""
    plain = names_in_one_process(model)
    buffers = {plain[name] for name, _ in model.named_buffers()}
    weights = state.model_tensors(model)
    if is_sharded(model):
        weights, optimizer = in_order(model, weights), None if optimizer is None else in_order(model, optimizer)
    parts = {MODEL: writable(weights, may_differ=buffers, copy=copy, group=group)}
    if optimizer is not None:
        parts[OPTIMIZER] = writable(optimizer, copy=copy, group=group)
    return parts


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
