"""The feed-forward networks that a recipe leaves dense, and why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from moeify.find.dense import DenseFFN, is_linear
from moeify.find.once import recognised
from moeify.find.shapes import Site
from moeify.find.where import is_expert, why_left
from moeify.layers import sparse_layers
from moeify.modes import fixed_randomness


def left_dense(model: nn.Module, sites: Sequence[Site]) -> dict[str, str]:
    """The feed-forward networks of a dense model outside of sites, and modules with the layers of one, with the reason.

    Empty where no site is a feed-forward network, as with adapters beside linear layers.
    """
    if not any(isinstance(site.dense, DenseFFN) for site in sites):
        return {}
    served = {id(part) for site in sites for part in site.dense.modules() if is_linear(part)}

    def is_left(module: nn.Module) -> bool:
        return not any(id(part) in served for part in module.modules())

    with fixed_randomness(model):
        found, rejected = recognised(model)
    sparse = list(sparse_layers(model))
    why = {
        site.name: why_left(model, site, [*sites, *found]) or "where=... does not choose it"
        for site in found
        if is_left(site.dense) and not is_expert(site, sparse)
    }
    rejected = [name for name in rejected if is_left(model.get_submodule(name))]
    return why | dict.fromkeys(rejected, "it does not compute down(act(up(x))) or down(act(gate(x)) · up(x))")
