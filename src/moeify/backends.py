"""Ways to run a whole layer. `compose` is the definition; every other backend must agree with it, gradient included."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.experts.base import Experts
from moeify.routing import Assignment, Routing


def compose(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """`C · experts(D · x)`, the definition of a sparse layer."""
    return routing.combine(experts(routing.dispatch(x), routing.counts))


@dataclass(frozen=True)
class Backend:
    """A way to run a whole layer.

    Attributes:
        run: computes the layer.
        refuse: the reason why this backend cannot serve a call, None if it can.
        chosen: whether `auto` takes this backend for such inputs, where it does not refuse.
    """

    run: Callable[[Tensor, Routing, Experts], Tensor]
    refuse: Callable[[Tensor, Routing, Experts], str | None]
    chosen: Callable[[Tensor], bool]


def _gather(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Undo the sort and add up each token's K answers: no atomic additions, so deterministic on a GPU."""
    assert isinstance(routing, Assignment)
    assert routing.choice is not None
    assert routing.index is not None
    rows = experts(routing.dispatch(x), routing.counts)
    tokens, k = routing.index.shape
    place = routing.source * k + routing.choice
    order = torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))
    weighted = rows.float() * routing.weight.float().unsqueeze(-1)
    return weighted[order].view(tokens, k, rows.shape[-1]).sum(1).view(*routing.shape, rows.shape[-1]).to(rows.dtype)


def _cannot_gather(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    if not isinstance(routing, Assignment):
        return f"it needs an Assignment, and the router gave a {type(routing).__name__}"
    if routing.index is None or routing.choice is None:
        return "it needs the same number of experts for every token"
    if routing.source.shape[0] != math.prod(routing.shape) * routing.index.shape[1]:
        return "it needs every row of every token, and some are padding or were dropped"
    if routing.rest is not None:
        return "it adds up rows only, and this router also speaks for experts that were not asked"
    if routing.weight.dim() > 1:
        return "it needs one weight per row, and the router gave several gates"
    return None


def _answered(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Combine the answers that the router has asked for already: no expert runs twice."""
    assert isinstance(routing, Assignment)
    assert routing.answers is not None
    return routing.combine(routing.answers)


def _unanswered(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    if not isinstance(routing, Assignment) or routing.answers is None:
        return "it needs a decision that brings the experts' answers, as only a router does that asks them first"
    return None


BACKENDS: dict[str, Backend] = {
    "answered": Backend(_answered, _unanswered, chosen=lambda x: True),
    "gather": Backend(_gather, _cannot_gather, chosen=lambda x: x.is_cuda),
    "compose": Backend(compose, refuse=lambda x, routing, experts: None, chosen=lambda x: True),
}


def run(name: str, x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Run a layer by the named backend; `auto` takes the first that is made for such inputs and does not refuse.

    With `MOEIFY_CHECK=1` in the environment every result is compared with `compose`.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve this call.
    """
    if name == "auto":
        name = choose(x, routing, experts)
    elif name not in BACKENDS:
        raise ValueError(f"no backend is called {name!r}; known are: auto, {', '.join(BACKENDS)}")
    elif reason := BACKENDS[name].refuse(x, routing, experts):
        raise ValueError(f"backend {name!r} cannot run this layer: {reason}; use backend='auto'")
    backend = BACKENDS[name]
    if os.environ.get("MOEIFY_CHECK") != "1" or backend.run is compose:
        return backend.run(x, routing, experts)
    with torch.no_grad(), torch.random.fork_rng():  # dropout falls on the same hidden units both times
        reference = compose(x, routing, experts)
    y = backend.run(x, routing, experts)
    _must_agree(name, y, reference)
    return y


def choose(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str:
    """The backend that `auto` takes."""
    return next(name for name, b in BACKENDS.items() if b.chosen(x) and b.refuse(x, routing, experts) is None)


def _must_agree(name: str, y: Tensor, reference: Tensor) -> None:
    tolerance = 64 * torch.finfo(y.dtype).eps * max(1.0, reference.abs().max().item())
    difference = (y.float() - reference.float()).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"backend {name!r} differs from the definition by {difference:.3g} (allowed {tolerance:.3g}); "
            "use backend='compose' and report this"
        )
