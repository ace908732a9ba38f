"""Routers in evaluation as settings of token choice (top-k), the only kind of routing that other programs have.

`choice_of.register(MyRouter)` adds a router of your own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from moeify.export.form import Misfit
from moeify.routers import (
    Capacity,
    Compete,
    DefaultVector,
    Frozen,
    GShard,
    NoisyTopK,
    SparseMixer,
    TopK,
    sigmoid,
    softmax,
    sqrt_softplus,
)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Token choice in evaluation, see `TopK`.

    Attributes:
        router: (E, D).
        k: experts per token.
        score: `softmax`, `sigmoid`, `sqrt_softplus` or `sparsemixer`.
        normalize: whether a token's weights are divided by their sum.
        scale: multiplies the weights.
        bias: the selection bias, (E,), if there is one.
        groups: how many groups, how many of them a token may use, and how they score; None for all.
        epsilon: of SparseMixer.
    """

    router: Tensor = field(repr=False)
    k: int
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    bias: Tensor | None = field(default=None, repr=False)
    groups: tuple[int, int, str] | None = None
    epsilon: float | None = None

    @property
    def traits(self) -> dict[str, Any]:
        """All but the tensors, by the names of the traits of a `Form`."""
        return {
            "k": self.k, "score": self.score, "normalize": self.normalize, "scale": self.scale,
            "selection_bias": self.bias is not None, "groups": self.groups, "epsilon": self.epsilon,
        }  # fmt: skip


_SCORES = {softmax: "softmax", sigmoid: "sigmoid", sqrt_softplus: "sqrt_softplus"}


@singledispatch
def choice_of(router: nn.Module) -> Choice:
    """The token choice that a router computes in evaluation.

    Raises:
        Misfit: it does not compute token choice by one linear projection.
    """
    raise Misfit(f"{type(router).__name__} is no token choice by one projection, which is all that other programs know")


@choice_of.register
def _(router: TopK) -> Choice:
    if router.per != "token":
        raise Misfit("one decision for a whole sequence (per='sequence') is known to no other program")
    if router.bias is not None:
        raise Misfit("the projection of its router has a bias (bias=True)")
    if router.score not in _SCORES:
        raise Misfit(
            f"a score of your own, {getattr(router.score, '__name__', router.score)}, is known to no other program"
        )
    if router.select == "logit" and router.selection_bias is not None:
        raise Misfit("its selection bias is added to logits (select='logit')")
    groups = router.expert_groups
    if groups is not None and groups.fill != float("-inf"):
        raise Misfit(f"experts of other groups score {groups.fill:g}, so that they may still be chosen")
    limited = groups is not None and groups.keep < groups.count
    return Choice(
        router=router.weight, k=router.k, score=_SCORES[router.score], normalize=router.normalize, scale=router.scale,
        bias=router.selection_bias, groups=(groups.count, groups.keep, groups.reduce) if groups and limited else None,
    )  # fmt: skip


@choice_of.register
def _(router: NoisyTopK) -> Choice:
    return Choice(router=router.weight, k=router.k, normalize=router.order == "select")


@choice_of.register
def _(router: Compete) -> Choice:
    return Choice(router=router.weight, k=router.k)


@choice_of.register
def _(router: Frozen) -> Choice:
    return Choice(router=router.weight, k=router.k)


@choice_of.register
def _(router: GShard) -> Choice:
    if router.eval_random:
        raise Misfit("its second expert is used at random in evaluation too (eval_random=True)")
    return Choice(router=router.weight, k=2)


@choice_of.register
def _(router: SparseMixer) -> Choice:
    return Choice(
        router=router.weight, k=router.k, score="sparsemixer", normalize=False, epsilon=router.epsilon
    )  # fmt: skip


@choice_of.register
def _(router: DefaultVector) -> Choice:
    if torch.any(router.get_buffer("default")):
        raise Misfit("experts that are not chosen contribute default vectors, which no other program adds")
    return Choice(router=router.weight, k=router.k, normalize=False)


@choice_of.register
def _(router: Capacity) -> Choice:
    if math.isinf(router.eval_factor):
        return choice_of(router.router)
    raise Misfit(
        "it drops rows beyond a capacity in evaluation, which no other program does as it does; to export it without, "
        "call moeify.serve.serve_with(model, capacity=float('inf')) first"
    )
