"""Observe the sites of a model in a forward pass: their calls, and the layout of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moeify.find.padding import padding_routed
from moeify.find.probe import Probe, find_probe
from moeify.find.shapes import Site
from moeify.modes import fixed_randomness


@dataclass(frozen=True)
class SiteCall:
    """The arguments with which the module in a site is called.

    Attributes:
        shape: leading shape of its tokens.
        keyword: the name of the argument with the tokens, None if it is positional.
        others: the names of its further arguments.
    """

    shape: torch.Size
    keyword: str | None
    others: tuple[str, ...]


@contextmanager
def observed(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, SiteCall]]:
    """The latest call of the module in each site while the model runs, by the site's name."""
    calls: dict[str, SiteCall] = {}
    handles = [
        getattr(*site.place).register_forward_pre_hook(partial(_keep_call, calls, site.name), with_kwargs=True)
        for site in sites
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keep_call(calls: dict[str, SiteCall], name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    names = list(inspect.signature(module.forward).parameters)
    by_position = [names[i] if i < len(names) else str(i) for i in range(len(args))]
    given = dict(zip(by_position, args, strict=True)) | kwargs
    first = next((key for key, value in given.items() if isinstance(value, Tensor)), None)
    if first is not None:
        x = given[first]
        others = tuple(key for key, value in given.items() if key != first and value is not None)
        calls[name] = SiteCall(x.shape[:-1], None if first in by_position else first, others)


def called_alike(sites: Sequence[Site], calls: Mapping[str, SiteCall], *, whole: bool = False) -> list[Site]:
    """The sites, with the keyword by which each is given its tokens.

    Args:
        sites: the sites to describe.
        calls: the call of the module in each site.
        whole: whether experts will be whole modules, which may be given more than tokens.

    Raises:
        ValueError: a site is called with more than its tokens.
    """
    for site in sites:
        if site.name in calls and calls[site.name].others and not whole:
            raise ValueError(
                f"{site.name} ({type(getattr(*site.place)).__name__}) cannot be an expert: it is called with more than "
                f"its tokens ({', '.join(calls[site.name].others)}); leave it out of where=..., or route whole "
                "sequences to copies of it with experts=whole_modules"
            )
    return [replace(site, keyword=calls[site.name].keyword) if site.name in calls else site for site in sites]


def laid_out(model: nn.Module, sites: Sequence[Site], probe: Probe, calls: Mapping[str, SiteCall]) -> list[Site]:
    """The sites, with the layout of their tokens where a call shows it: (B, N, D), or sequence first, (N, B, D).

    torch's attention modules define their layout in `batch_first`; sites beside one are unchanged.
    """
    batch = probe.batch
    shapes = {name: call.shape for name, call in calls.items()}
    return [_with_layout(model, site, shapes.get(site.name), batch) for site in sites]


def _with_layout(model: nn.Module, site: Site, shape: torch.Size | None, batch: int | None) -> Site:
    if batch is None or shape is None or len(shape) != 2:
        return site
    stack = model.get_submodule(site.stack) if site.stack else model
    if any(isinstance(part, nn.MultiheadAttention) for part in stack.modules()):
        return site
    first, second = shape
    return replace(site, sequence_first=second == batch != first)


def seen_in_a_run(model: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """The sites, with the layout of tokens that a guessed input shows; unchanged if no input can be guessed."""
    if not sites:
        return []
    with fixed_randomness(model):
        probe = find_probe(model)
        if probe is None:
            return list(sites)
        with observed(model, sites) as calls:
            probe.run(model)
        return padding_routed(model, laid_out(model, sites, probe, calls), probe)
