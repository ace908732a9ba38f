"""Observe in a forward pass which tokens sparse layers treat as padding, and whether real tokens depend on padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moeify.context import Context
from moeify.find.contexts import contexts_of
from moeify.find.probe import Probe
from moeify.find.shapes import Site
from moeify.stacks import watch

Masks = list[Bool[Tensor, "B N"]]


def at_real_tokens(values: Iterable[Tensor], real: Masks) -> list[Tensor]:
    """Outputs at the real tokens alone, if a mask of their first two dimensions is known; others unchanged.

    Where several masks have these dimensions, at the tokens that are real in all.
    """
    by_shape: dict[torch.Size, Tensor] = {}
    for mask in real:
        by_shape[mask.shape] = by_shape.get(mask.shape, mask) & mask
    return [
        value[by_shape[value.shape[:2]]] if value.dim() > 2 and value.shape[:2] in by_shape else value
        for value in values
    ]


@contextmanager
def padding_seen(layers: Iterable[nn.Module]) -> Iterator[Masks]:
    """The real tokens of each stack, filled in while a model runs whose layers have a `Context`.

    Of a stack whose tokens are not those of its mask (a model downsampled them), they are not known.

    A stack that lays tokens out as (N, B, D) is in a model whose outputs have that layout (torch) or not (XLNet), so
    that its mask is there both ways.
    """
    found: Masks = []
    handles = [layer.register_forward_pre_hook(partial(_keep_mask, found), with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep_mask(found: Masks, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    context: Context = layer.context  # pyrefly: ignore[bad-assignment]
    positions, shape = context.real(x.shape[:-1]), x.shape[:-1]
    if len(shape) == 2 and (positions is not None or context.call.token_mask is None):
        every = positions is None
        real = x.new_ones(shape, dtype=torch.bool) if every else _as_mask(positions, shape, x.device)
        found += [real] if context.batch_first is not False else [real, real.T]


def _as_mask(positions: Tensor, shape: Sequence[int], device: torch.device) -> Bool[Tensor, "..."]:
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool, device=device)
    return mask.index_fill(0, positions, True).view(*shape)


def padding_routed(model: nn.Module, sites: Sequence[Site], probe: Probe) -> list[Site]:
    """The sites, with `routes_padding` if outputs at real tokens depend on the sites' outputs at padding.

    Some models pool a position that may be padding (SigLIP), or mix it into others by convolutions or landmarks
    (ConvBERT, Nyströmformer). There a sparse layer must compute padding too, or outputs at real tokens change. It holds
    for all stacks of a model, since one batch may show it of one stack, and another batch of another (CANINE).

    Args:
        model: the dense model.
        sites: where sparse layers will be inserted.
        probe: tested with its own padding, such as that of images, and with padding added to its texts.
    """
    has_mask = any("mask" in name for name in probe.kwargs or {})
    probes = [each for each in (probe if has_mask else None, _padded(model, probe)) if each is not None]
    reads = any(_reads_padding(model, sites, each) for each in probes)
    return [replace(site, routes_padding=reads) for site in sites]


def _padded(model: nn.Module, probe: Probe) -> Probe | None:
    config = getattr(model, "config", None)
    padding = getattr(getattr(config, "text_config", config), "pad_token_id", None)
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return probe.padded(padding if isinstance(padding, int) else 0) if takes_mask else None


def _reads_padding(model: nn.Module, sites: Sequence[Site], probe: Probe) -> bool:
    try:
        before = probe.outputs(model)
    except MemoryError:  # no evidence about the model
        raise
    except Exception:  # any error means that the model accepts no mask of this form
        return False
    return _changed_by_silence(model, sites, probe, before)


def _changed_by_silence(model: nn.Module, sites: Sequence[Site], probe: Probe, before: list[Tensor]) -> bool:
    """Whether an output at real tokens changes if sites output zero where sparse layers would see padding."""
    contexts = contexts_of(sites)
    silent = [_Silent(site.dense, contexts[site.stack]) for site in sites]
    undo = [site.install(layer) for site, layer in zip(sites, silent, strict=True)]
    undo += [handle.remove for handle in watch(model, [site.name for site in sites], contexts)]
    try:
        with padding_seen(silent) as real:
            after = probe.outputs(model)
    except ValueError:  # the mask is not for these tokens
        return True
    finally:
        for restore in reversed(undo):
            restore()
    pairs = zip(at_real_tokens(before, real), at_real_tokens(after, real), strict=True)
    return any(_changes(a, b) for a, b in pairs if a.shape == b.shape)


def _changes(before: Tensor, after: Tensor) -> bool:
    """Whether an output at real tokens, or one without tokens, changes by more than rounding."""
    if before.dim() > 2 or not before.numel():
        return False
    rounding = torch.finfo(before.dtype).eps ** 0.5
    return (before - after).abs().max().item() > rounding * before.abs().max().item()


class _Silent(nn.Module):
    """A module whose outputs at padding are zero, as those of a sparse layer are."""

    def __init__(self, dense: nn.Module, context: Context) -> None:
        super().__init__()
        self.dense, self.context = dense, context

    @property
    def weight(self) -> Tensor:
        """The weight of a linear layer, whose dtype some models access (T5)."""
        return self.dense.get_parameter("weight")

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x)
        positions = self.context.real(x.shape[:-1])
        if positions is None or y.shape[:-1] != x.shape[:-1]:
            return y
        return torch.where(_as_mask(positions, x.shape[:-1], y.device).unsqueeze(-1), y, 0)
