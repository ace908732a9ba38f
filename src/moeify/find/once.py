"""Search a model for its feed-forward networks once, and share the result between all functions that need it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from moeify.find.shapes import Site, recognise

Found = tuple[list[Site], list[str]]

_kept: ContextVar[dict[nn.Module, Found] | None] = ContextVar("kept", default=None)


@contextmanager
def searching_once() -> Iterator[None]:
    """Context manager that caches the results of `recognised`; models must not be changed inside."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def recognised(model: nn.Module) -> Found:
    """As `recognise`, without a second search of the same model inside `searching_once`."""
    kept = _kept.get()
    if kept is None:
        return recognise(model)
    if model not in kept:
        kept[model] = recognise(model)
    sites, rejected = kept[model]
    return list(sites), list(rejected)
