"""The importance of hidden units by the size of their weights alone, without data."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor

from moeify.find.dense import DenseFFN
from moeify.registry import register

Importance = Callable[[DenseFFN, int], Float[Tensor, "E H"]]
"""The importance of every hidden unit for every expert: `by_weights`, or a `Measured`."""


@register("importance", "by_weights")
def by_weights(dense: DenseFFN, parts: int) -> Float[Tensor, "E H"]:
    """The product of the norms of the weights into a hidden unit and out of it, the same for every expert."""
    into = dense.up_weight.float().unflatten(0, (dense.activation.projections, -1)).norm(dim=-1).prod(0)
    return (into * dense.down_weight.float().norm(dim=0)).expand(parts, -1)


@register("split", "importance")
def importance(dense: DenseFFN, parts: int) -> Int[Tensor, "E h"]:
    """Every expert gets its share of the important hidden units, by the size of the weights into and out of them."""
    order = by_weights(dense, 1)[0].argsort(descending=True).view(-1, parts)
    order[1::2] = order[1::2].flip(1)  # in snake order, 1..E and E..1, for equal shares of importance
    return order.t()
