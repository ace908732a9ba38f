"""`Snapshot`: a model's structure and settings, to restore them after a failed or temporary change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moeify.given import model_given

T = TypeVar("T")


class Snapshot:
    """Every attribute, submodule, hook and buffer of a model and its configs, and torch's random numbers.

    Parameters are kept by reference and not copied: callers must not change their values in between.

    Args:
        model: any module.
        values: keep copies of buffers too, for models that run in between.
    """

    def __init__(self, model: nn.Module, *, values: bool = True) -> None:
        owners: list[Any] = [*model_given(model).modules()]
        configs = {id(config): config for part in owners if (config := getattr(part, "config", None))}
        self._restorers = [_restorer(owner, values) for owner in (*owners, *configs.values())]
        self._learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._devices = sorted({str(p.device) for p, _ in self._learning if p.is_cuda})
        self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self._devices]

    def restore(self) -> None:
        """Restore the model, its configs and the random numbers."""
        for restore in self._restorers:
            restore()
        for parameter, learns in self._learning:
            parameter.requires_grad_(learns)
        torch.set_rng_state(self._random[0])
        for device, state in zip(self._devices, self._random[1], strict=True):
            torch.cuda.set_rng_state(state, device)


def restored_on_error(model: nn.Module, action: Callable[[], T], *, values: bool = True) -> T:
    """Run an action and return its result; if it raises or is interrupted, restore the model first."""
    before = Snapshot(model, values=values)
    try:
        return action()
    except BaseException:
        before.restore()
        raise


def _restorer(owner: Any, copied: bool) -> Callable[[], None]:
    attributes = dict(vars(owner))
    tables = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
    values = {}
    if copied:
        buffers = tables.get("_buffers", {}).items()
        values = {n: value.clone() for n, value in buffers if isinstance(value, Tensor) and not value.is_meta}

    def restore() -> None:
        state = vars(owner)
        state.clear()
        state.update(attributes)
        for name, table in tables.items():
            state[name].clear()
            state[name].update(table)
        for name, value in values.items():
            if not torch.equal(state["_buffers"][name], value):
                state["_buffers"][name].copy_(value)

    return restore
