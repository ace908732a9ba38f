"""The largest output value of each expert for the tokens routed to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.measurements.layer_inputs import LayerInputs, experts_of


@torch.no_grad()
def largest_outputs(seen: Mapping[str, LayerInputs]) -> dict[str, Float[Tensor, "E"]]:
    """max |output| of every expert over its rows, before the router's weight; NaN for an expert without rows.

    (Super Experts, arXiv 2507.23279, section 3: outliers in the output of down_proj.) Layers whose experts
    cannot be called one by one, or that received no tokens, are omitted.
    """
    found = {}
    for name, layer in seen.items():
        if not layer.passes:
            continue
        try:
            experts = experts_of(layer.layer)
        except ValueError:
            continue
        most = torch.full((layer.layer.num_experts,), float("nan"))
        for x, routing in layer.passes:
            if not len(routing.source):
                continue
            outputs = experts(routing.dispatch(x), routing.counts).abs().flatten(1).amax(1).float().cpu()
            new = torch.full_like(most, -1.0).scatter_reduce(0, routing.expert.cpu(), outputs, "amax")
            most = torch.where(new < 0, most, torch.fmax(most, new))
        found[name] = most
    return found
