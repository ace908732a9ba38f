"""Backends in plain torch: the reference `compose`, `gather`, and `combine_outputs` for precomputed expert outputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.backends.base import needs_one_weight, needs_rows_only, sparse
from moeify.experts.base import Experts
from moeify.routing import Routing


def compose(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """`combine(experts(dispatch(x)))`, the reference implementation of a sparse layer."""
    return routing.combine(experts(routing.dispatch(x), routing.counts))


def gather(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Unsort the rows and sum each token's K expert outputs: no atomic additions, so deterministic on a GPU."""
    routing = sparse(routing)
    assert routing.rank is not None
    assert routing.choices is not None
    rows = experts(routing.dispatch(x), routing.counts)
    tokens, k = routing.choices.indices.shape
    place = routing.source * k + routing.rank
    order = torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))
    weighted = rows.float() * routing.weight.float().unsqueeze(-1)
    return weighted[order].view(tokens, k, rows.shape[-1]).sum(1).view(*routing.shape, rows.shape[-1]).to(rows.dtype)


def cannot_gather(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why `gather` does not support a call, None if it does."""
    if reason := needs_one_weight(routing) or needs_rows_only(routing):
        return reason
    routing = sparse(routing)
    if routing.choices is None or routing.rank is None:
        return "it needs the same number of experts for every token"
    if not routing.has_all_rows:
        return "it needs every row of every token, and some are padding or were dropped"
    return None


def combine_outputs(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Combine the expert outputs that the router has already computed, without running an expert again."""
    assert routing.expert_outputs is not None
    return routing.combine(routing.expert_outputs)


def cannot_combine_outputs(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why `combine_outputs` does not support a call, None if it does."""
    if routing.expert_outputs is None:
        return "it needs a decision with expert outputs, which only a router brings that runs the experts itself"
    return None
