"""Check that sparse layers are causal: replace one token, and see whether earlier outputs or decisions change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.context import Call, Context
from moeify.find.probe import as_probe, find_probe
from moeify.layers import SparseLayer, sparse_layers
from moeify.modes import fixed_randomness
from moeify.record import record


@dataclass(frozen=True)
class Leak:
    """A token whose decision or output changed because another token was replaced.

    Attributes:
        what: whether its experts and their weights changed, or only the layer's output for it.
        token: the sequence and the position of the token that changed.
        by: the sequence and the position of the token that was replaced, or the first that was cut off.
    """

    what: Literal["decision", "output"]
    token: tuple[int, int]
    by: tuple[int, int]


@dataclass(frozen=True)
class Causality:
    """The result for one layer; true if no token depends on a later one of its sequence.

    Attributes:
        future: a token that changed with a later one of its own sequence: training leaks, generation differs.
        others: a token that changed with one of another sequence: outputs depend on the rest of the batch.
        length: a token that changed when its sequence was truncated after it, though no other token was replaced; for
            example, because a capacity grows with the number of tokens.
    """

    future: Leak | None = None
    others: Leak | None = None
    length: Leak | None = None

    def __bool__(self) -> bool:
        return self.future is None and self.length is None


@torch.no_grad()
def check_causality(model: nn.Module, tokens: Any = None, *, tries: int = 4) -> dict[str, Causality]:
    """Replace every token of every sparse layer's input, one at a time, and see which other tokens change.

    Then truncate the sequence after each token, and see whether it changes.

    Each layer is run alone, on its input in the model, so that a leak is attributed to its layer and attention plays no
    part. The check is empirical: a capacity that is never reached shows no leak. The model keeps its mode, because
    routers differ between training and evaluation, and every run has the same random numbers. For layers of
    transformers, and for dense mixtures, only outputs are compared.

    Args:
        model: a sparse model.
        tokens: an input (a tensor, a tuple of arguments or a mapping), of two or more sequences for `others` to mean
            anything; by default one is guessed.
        tries: how often each token is replaced, by noise and by enlarged copies of other tokens in turn.

    Raises:
        ValueError: the model has no sparse layer, or no input for it could be guessed.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer whose causality could be checked")
    probe = find_probe(model) if tokens is None else as_probe(tokens)
    if probe is None:
        raise ValueError(f"no input for {type(model).__name__} could be guessed; pass tokens")
    calls: dict[str, tuple[tuple, dict[str, Any], Call]] = {}
    hooks = [
        layer.module.register_forward_pre_hook(_keep(name, layer.context, calls), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with fixed_randomness(model):
            model(*probe.args, **(probe.kwargs or {}))
    finally:
        for hook in hooks:
            hook.remove()
    with fixed_randomness(model):
        return {name: _check_in_pass(layers[name], *call, tries) for name, call in calls.items()}


def _keep(name: str, context: Context, calls: dict[str, tuple[tuple, dict[str, Any], Call]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name] = (args, kwargs, context.call)

    return hook


def _check_in_pass(layer: SparseLayer, args: tuple, kwargs: dict[str, Any], call: Call, tries: int) -> Causality:
    with layer.context.resumed(call):
        return _check(layer.module, layer.context, args, kwargs, tries)


def _check(layer: nn.Module, context: Context, args: tuple, kwargs: dict[str, Any], tries: int) -> Causality:
    x = args[0] if args else next(iter(kwargs.values()))

    def run(x: Tensor) -> list[Tensor]:
        arguments = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): x})
        with fixed_randomness(layer), record(layer) as decisions:
            y = layer(*arguments[0], **arguments[1])
        y = y if isinstance(y, Tensor) else next(part for part in y if isinstance(part, Tensor))
        return [decisions[""].weight_table(), y.reshape(len(sequence), -1).float()]

    sequence = context.sequence_ids(x.shape[:-1]).to(x.device)
    position = _positions(sequence)
    before = run(x)
    real = context.real(x.shape[:-1])
    future: Leak | None = None
    others: Leak | None = None
    for token in range(len(sequence)) if real is None else real.tolist():
        by = (int(sequence[token]), int(position[token]))
        for attempt in range(tries):
            changed = x.clone().reshape(-1, x.shape[-1])
            changed[token] = _other(changed, token, attempt)
            after = run(changed.view(x.shape))
            for what, a, b in zip(("decision", "output"), before, after, strict=True):
                differs = _differs(a, b, x.dtype)
                earlier = differs & (sequence == sequence[token]) & (position < position[token])
                elsewhere = differs & (sequence != sequence[token])
                future = future or _leak(what, earlier, sequence, position, by)
                others = others or _leak(what, elsewhere, sequence, position, by)
        if future and others:
            break
    length = _length_leak(context, run, x, sequence, position, before)
    return Causality(future, others, length)


def _length_leak(
    context: Context,
    run: Callable[[Tensor], list[Tensor]],
    x: Float[Tensor, "... D"],
    sequence: Int[Tensor, "T"],
    position: Int[Tensor, "T"],
    before: list[Tensor],
) -> Leak | None:
    """A token that changes where what follows it is padding."""
    call, real = context.call, torch.zeros_like(sequence, dtype=torch.bool)
    positions = context.real(x.shape[:-1])
    real[slice(None) if positions is None else positions] = True
    for cut in range(1, int(position.max()) + 1):
        kept = real & (position < cut)
        if not kept.any():
            continue
        shorter = replace(call, decisions=dict(call.decisions), layer_mask=False)
        shorter.mask(kept.view(x.shape[:-1]))
        with context.resumed(shorter):
            after = run(x)
        for what, a, b in zip(("decision", "output"), before, after, strict=True):
            changed = _differs(a, b, x.dtype) & kept
            if changed.any():
                return _leak(what, changed, sequence, position, (int(sequence[changed][0]), cut))
    return None


def _positions(sequence: Int[Tensor, "T"]) -> Int[Tensor, "T"]:
    """The position of each token in its sequence."""
    same = sequence.unsqueeze(0) == sequence.unsqueeze(1)
    return same.tril(-1).sum(-1)


def _other(tokens: Float[Tensor, "T D"], token: int, attempt: int) -> Float[Tensor, "D"]:
    if attempt % 2 == 0:
        return torch.randn_like(tokens[token]) * tokens.std()
    return 2 * tokens[int(torch.randint(len(tokens), ()))]


def _differs(a: Float[Tensor, "T W"], b: Float[Tensor, "T W"], dtype: torch.dtype) -> Bool[Tensor, "T"]:
    largest = float(a.abs().max()) if a.numel() else 0.0
    return ((a - b).abs() > 64 * torch.finfo(dtype).eps * max(1.0, largest)).any(-1)


def _leak(
    what: Any, changed: Bool[Tensor, "T"], sequence: Int[Tensor, "T"], position: Int[Tensor, "T"], by: tuple[int, int]
) -> Leak | None:
    if not changed.any():
        return None
    first = int(changed.nonzero()[0])
    return Leak(what, (int(sequence[first]), int(position[first])), by)
