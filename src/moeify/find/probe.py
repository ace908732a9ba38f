"""An input that a model accepts, to compare what it computes before and after a change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.context import extra_inputs
from moeify.find.dense import compute_dtype
from moeify.find.guesses import guesses
from moeify.masks import real_tokens
from moeify.modes import fixed_randomness, in_evaluation
from moeify.routers.lookup import columns
from moeify.snapshot import Snapshot


@dataclass(frozen=True)
class Probe:
    """Arguments of one call of a model."""

    args: tuple = ()
    kwargs: dict[str, Any] | None = None

    def run(self, model: nn.Module) -> Tensor:
        """The model's main output in evaluation, in fp32; models that draw random numbers draw the same every time.

        Routers that look up an input that the probe does not have, such as a task, look up 0. Other changes that the
        call makes to the model are undone.
        """
        return _main(self._output(model)).float()

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Every floating-point tensor among the model's outputs, as of `run`; positions of padding are excluded."""
        values = [value.float() for value in _tensors(self._output(model))]
        mask = (self.kwargs or {}).get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return values
        real = real_tokens(mask)
        return [value[real] if value.dim() > 2 and value.shape[:2] == real.shape else value for value in values]

    @torch.no_grad()
    def _output(self, model: nn.Module) -> Any:
        with restored(model), in_evaluation(model), fixed_randomness(model), self._untold(model):
            return model(*self.args, **(self.kwargs or {}))

    @property
    def batch(self) -> int | None:
        """The number of sequences or images, None if arguments are positional."""
        return next((len(value) for value in (self.kwargs or {}).values() if isinstance(value, Tensor)), None)

    def by_name(self, model: nn.Module) -> Probe:
        """The same arguments by name, for models of transformers, whose argument names identify them."""
        given = inspect.signature(model.forward).parameters.values()
        names = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
        if not hasattr(model, "config") or len(names) < len(self.args):
            return self
        return Probe(kwargs=dict(zip(names, self.args, strict=False)) | (self.kwargs or {}))

    def padded(self, padding: int) -> Probe | None:
        """The same texts, or else sounds, with a mask that makes the last of them padding from its middle on.

        Args:
            padding: the id of a padding token.
        """
        given = self.kwargs or {}
        name = next((name for name in ("input_ids", "input_values", "input_features") if name in given), "")
        whole = given.get(name)
        if whole is None or whole.dim() != (3 if name == "input_features" else 2) or min(whole.shape[:2]) < 2:
            return None
        real = torch.ones(whole.shape[:2], dtype=torch.bool, device=whole.device)
        real[-1, whole.shape[1] // 2 :] = False
        hidden = ~real.view(*real.shape, *[1] * (whole.dim() - 2))
        silent = whole.masked_fill(hidden, padding if name == "input_ids" else 0)
        return Probe(kwargs={**given, name: silent, "attention_mask": real.long()})

    def _untold(self, model: nn.Module) -> AbstractContextManager[None]:
        names = columns(model) - (self.kwargs or {}).keys()
        if not names:
            return nullcontext()
        first = next(value for value in (*self.args, *(self.kwargs or {}).values()) if isinstance(value, Tensor))
        return extra_inputs(model, **dict.fromkeys(names, torch.zeros(len(first), dtype=torch.int64)))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Every attribute, submodule and buffer of a model as it was: some change permanently at their first call."""
    before = Snapshot(model)
    try:
        yield
    finally:
        before.restore()


def as_probe(given: Any) -> Probe:
    """A probe from what a user passed: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(given, dict):
        return Probe(kwargs=given)
    return Probe(args=given if isinstance(given, tuple) else (given,))


def find_probe(model: nn.Module) -> Probe | None:
    """A random input that the model accepts, None if every guess fails or the model is on the meta device."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        return None
    like = torch.empty(0, dtype=compute_dtype(model, model), device=parameter.device)
    for args, kwargs in guesses(model):
        probe = Probe(_moved(args, like), _moved(kwargs, like))
        try:
            if torch.isfinite(probe.run(model)).all():
                return probe
        except Exception:  # any error means that the model does not accept this guess
            continue
    return None


def _moved(inputs: Any, like: Tensor) -> Any:
    if isinstance(inputs, dict):
        return {name: _moved(value, like) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_moved(value, like) for value in inputs)
    return inputs.to(like.device, like.dtype if inputs.is_floating_point() else None)


def _main(output: Any) -> Tensor:
    """The logits; without logits, the first floating-point tensor of an output."""
    logits = getattr(output, "logits", None)
    return next(_tensors(output if logits is None else logits))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield from [output] if output.is_floating_point() else []
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
