"""What a backend must be: a way to run a whole layer, and when not to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moeify.experts.base import Experts
from moeify.routing import Routing


@dataclass(frozen=True)
class Backend:
    """A way to run a whole layer.

    Attributes:
        run: computes the layer.
        refuse: the reason why this backend cannot serve a call, None if it can.
        chosen: whether `auto` takes this backend for such a call, where it does not refuse.
    """

    run: Callable[[Tensor, Routing, Experts], Tensor]
    refuse: Callable[[Tensor, Routing, Experts], str | None]
    chosen: Callable[[Tensor, Routing, Experts], bool]
