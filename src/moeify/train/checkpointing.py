"""Activation checkpointing that cannot change its mind: what is recomputed goes to the experts that it went to first.

A forward pass that is repeated in backward may route a token elsewhere: kernels are not deterministic, and a tie or a
last bit decides between two experts. The gradient then belongs to another function than the loss. So the choices are
kept, as integers, and everything else is recomputed:

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_decisions})
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_SELECT = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim}
_WHICH = {aten.argmax.default, aten.argmin.default}


class _Keep(TorchDispatchMode):
    """The first forward pass: remember every choice."""

    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self.choices = choices

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SELECT:
            self.choices.append(out[1].clone())
        elif func in _WHICH:
            self.choices.append(out.clone())
        return out


class _Replay(TorchDispatchMode):
    """The repeated forward pass: make every choice again as it was made, with the values of now."""

    def __init__(self, choices: list[Tensor]) -> None:
        super().__init__()
        self.choices = choices

    def __enter__(self) -> _Replay:
        self.at = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _SELECT:
            kept = self._next(out[1])
            return _gather(args[0], kept, _dim(func, args, kwargs), like=out[0]), kept
        return self._next(out) if func in _WHICH else out

    def _next(self, now: Tensor) -> Tensor:
        if self.at == len(self.choices) or self.choices[self.at].shape != now.shape:
            raise RuntimeError(
                "a checkpointed layer makes other choices when it is repeated than it made first: its control flow "
                "depends on something that changed in between, such as a counter; leave that layer out of checkpointing"
            )
        kept = self.choices[self.at].clone()
        self.at += 1
        return kept


def _dim(func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    place = {aten.topk.default: 2, aten.sort.default: 1, aten.sort.stable: 2, aten.max.dim: 1}[func]
    return kwargs.get("dim", args[place] if len(args) > place else -1)


def _gather(x: Tensor, index: Tensor, dim: int, *, like: Tensor) -> Tensor:
    """The values of x at what was chosen; `max` drops the dimension it chooses from."""
    if index.dim() == x.dim():
        return x.gather(dim, index)
    return x.gather(dim, index.unsqueeze(dim)).squeeze(dim).view(like.shape)


def keep_decisions() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of `torch.utils.checkpoint`: routing decisions are kept, everything else is recomputed.

    Kept are the indices chosen by topk, sort, argsort, max and argmax; their values are read again from the recomputed
    tensor, so that gradients are those of the forward pass. Costs 8 bytes per choice.

    Raises:
        RuntimeError: in backward, a layer that chooses more often, or among another number, than in its forward pass.
    """
    choices: list[Tensor] = []
    return _Keep(choices), _Replay(choices)


def enable(model: nn.Module, kwargs: dict[str, Any] | None = None) -> None:
    """Turn on activation checkpointing of a transformers model, non-reentrant and with its decisions kept.

    Args:
        model: any model of transformers that supports activation checkpointing.
        kwargs: what `TrainingArguments` calls `activation_checkpointing_kwargs`.

    Raises:
        ValueError: `use_reentrant` is True.
    """
    kwargs = dict(kwargs or {})
    if kwargs.get("use_reentrant"):
        raise ValueError(
            "re-entrant activation checkpointing hides the routers' decisions from the balance loss: its first forward "
            "pass runs without gradients; pass use_reentrant=False"
        )
    kwargs = {"use_reentrant": False, "context_fn": keep_decisions} | kwargs
    options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # the second is its older name
    turn_on: Callable[..., None] = next(getattr(model, name) for name in names if hasattr(model, name))
    turn_on(kwargs, **options)
