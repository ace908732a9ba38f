"""Activation checkpointing with fixed routing: the recomputed forward pass sends tokens to the experts of the first.

A forward pass that is repeated in backward may route a token elsewhere: kernels are not deterministic, and a tie or a
last bit decides between two experts. The gradient then belongs to another function than the loss. So the choices are
kept, as integers, and everything else is recomputed. The inputs of the model, such as its mask, are kept too, since
several forward passes may come before one backward pass (DPO, distillation):

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_decisions})
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeify.context import running

aten = torch.ops.aten
_SELECT = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim}
_WHICH = {aten.argmax.default, aten.argmin.default}


Choices = dict[tuple, list[Tensor]]
"""The indices chosen by each operation (topk, sort, ...), in order. They are kept by operation, since
hooks on a layer call such operations too, in its first forward pass only."""


class _Keep(TorchDispatchMode):
    """The first forward pass: store every choice."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SELECT or func in _WHICH:
            index = out[1] if func in _SELECT else out
            self.choices.setdefault((func, index.shape), []).append(index.clone())
        return out


class _Replay(TorchDispatchMode):
    """The repeated forward pass: repeat every choice, and read its values from the recomputed tensor."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices
        self.passes = running()

    def __enter__(self) -> _Replay:
        self.left = {kind: iter(kept) for kind, kept in self.choices.items()}
        self.resumed = ExitStack()
        for context, call in self.passes:
            self.resumed.enter_context(context.resumed(call))
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self.resumed.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _SELECT:
            kept = self._next(func, out[1])
            return _gather(args[0], kept, _dim(func, args, kwargs), like=out[0]), kept
        return self._next(func, out) if func in _WHICH else out

    def _next(self, func: Any, now: Tensor) -> Tensor:
        kept = next(self.left.get((func, now.shape), iter(())), None)
        if kept is None:
            raise RuntimeError(
                "a checkpointed layer makes other choices when it is repeated than it made first: its control flow "
                "depends on something that changed in between, such as a counter; leave that layer out of checkpointing"
            )
        return kept.clone()


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
    choices: Choices = {}
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
