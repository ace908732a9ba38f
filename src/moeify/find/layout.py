"""How the layers of a model lay out their tokens, and whether it reads padding: seen in runs of a probe."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moeify.find.dense import DenseFFN
from moeify.find.probe import Probe
from moeify.find.shapes import Site


def laid_out(model: nn.Module, sites: list[Site], probe: Probe) -> list[Site]:
    """The sites, with the layout of their tokens where the probe shows it: (B, N, D), or sequence first, (N, B, D).

    torch's attention modules say themselves how they lay out tokens; beside one, a site is left as it is.
    """
    batch = probe.batch
    if batch is None:
        return sites
    shapes: dict[str, torch.Size] = {}
    handles = [
        getattr(*site.place).register_forward_pre_hook(partial(_keep_shape, shapes, site.name), with_kwargs=True)
        for site in sites
    ]
    try:
        probe.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return [_with_layout(model, site, shapes.get(site.name), batch) for site in sites]


def _keep_shape(shapes: dict[str, torch.Size], name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is not None:
        shapes[name] = x.shape[:-1]


def _with_layout(model: nn.Module, site: Site, shape: torch.Size | None, batch: int) -> Site:
    stack = model.get_submodule(site.stack) if site.stack else model
    if shape is None or len(shape) != 2 or any(isinstance(part, nn.MultiheadAttention) for part in stack.modules()):
        return site
    first, second = shape
    return replace(site, sequence_first=second == batch != first)


def padding_is_read(model: nn.Module, sites: list[Site], probe: Probe) -> float | None:
    """How much an output at real tokens changes if feed-forward networks are silent at padding; None if it does not."""
    config = getattr(model, "config", None)
    padding = getattr(getattr(config, "text_config", config), "pad_token_id", None)
    padded = probe.padded(padding if isinstance(padding, int) else 0)
    if padded is None or "attention_mask" not in inspect.signature(model.forward).parameters:
        return None
    given, real = padded
    try:
        before = given.outputs(model)
    except MemoryError:  # says nothing about the model
        raise
    except Exception:  # whatever a model raises that takes no mask of this form
        return None
    undo = [site.install(_Silent(site.dense, real)) for site in sites if isinstance(site.dense, DenseFFN)]
    try:
        after = given.outputs(model)
    finally:
        for restore in reversed(undo):
            restore()
    changes = [_change(a, b, real) for a, b in zip(before, after, strict=True) if a.shape == b.shape]
    return max((change for change in changes if change > 0), default=None)


def _change(before: Tensor, after: Tensor, real: Bool[Tensor, "B N"]) -> float:
    """The largest change, 0 if it is no more than rounding or at tokens that are not the model's input."""
    if before.dim() > 2:
        if before.shape[:2] != real.shape:
            return 0.0
        before, after = before[real], after[real]
    change = (before - after).abs().max().item()
    rounding = torch.finfo(before.dtype).eps ** 0.5
    return change if change > rounding * before.abs().max().item() else 0.0


class _Silent(nn.Module):
    """A feed-forward network whose outputs at padding are zero, as those of a sparse layer are."""

    def __init__(self, dense: nn.Module, real: Bool[Tensor, "B N"]) -> None:
        super().__init__()
        self.dense, self.real = dense, real

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        if x.shape[:-1] == self.real.shape:
            return y * self.real.unsqueeze(-1)
        return y * self.real.T.unsqueeze(-1) if x.shape[:-1] == self.real.shape[::-1] else y
