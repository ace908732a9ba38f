"""Express routers in evaluation as settings of token choice (top-k), the only routing that other programs support.

`token_choice_of.register(MyRouter)` adds a router of your own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from moeify.export.model_spec import Unsupported
from moeify.routers import (
    Capacity,
    Compete,
    DefaultVector,
    ExpertGroups,
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
class TokenChoice:
    """Token choice in evaluation, see `TopK`.

    Attributes:
        router: (E, D).
        k: experts per token.
        score: `softmax`, `sigmoid`, `sqrt_softplus` or `sparsemixer`.
        normalize: whether a token's weights are divided by their sum.
        scale: multiplies the weights.
        bias: the selection bias, (E,), if there is one.
        groups: how many groups, how many of them a token may use, and how they are scored; None for no groups.
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
        """All but the tensors, by the names of the traits of a `ModelSpec`."""
        return {
            "k": self.k, "score": self.score, "normalize": self.normalize, "scale": self.scale,
            "selection_bias": self.bias is not None, "groups": self.groups, "epsilon": self.epsilon,
        }  # fmt: skip


_SCORES = {softmax: "softmax", sigmoid: "sigmoid", sqrt_softplus: "sqrt_softplus"}


@singledispatch
def token_choice_of(router: nn.Module) -> TokenChoice:
    """The token choice that a router computes in evaluation.

    Raises:
        Unsupported: it does not compute token choice by one linear projection.
    """
    raise Unsupported(
        f"its router, {type(router).__name__}, does not choose the top k experts of every token by one linear "
        "projection, the only routing that other programs support"
    )


@token_choice_of.register
def _(router: TopK) -> TokenChoice:
    if router.per != "token":
        raise Unsupported("its router decides once per sequence (per='sequence'), which no other program supports")
    if router.bias is not None:
        raise Unsupported("the projection of its router has a bias (bias=True)")
    if router.score not in _SCORES:
        raise Unsupported(
            f"no other program supports the score function {getattr(router.score, '__name__', router.score)}"
        )
    if router.select == "logit" and router.selection_bias is not None:
        raise Unsupported("its selection bias is added to logits (select='logit')")
    groups = router.expert_groups
    if groups is not None and not isinstance(groups, ExpertGroups):
        raise Unsupported("a token uses as many experts of every group (PerGroup), which no other program supports")
    if groups is not None and groups.fill != float("-inf"):
        raise Unsupported(
            f"experts outside the chosen groups score {groups.fill:g} (expert_groups.fill) and may still be chosen"
        )
    limited = groups is not None and groups.keep < groups.count
    return TokenChoice(
        router=router.weight, k=router.k, score=_SCORES[router.score], normalize=router.normalize, scale=router.scale,
        bias=router.selection_bias, groups=(groups.count, groups.keep, groups.reduce) if groups and limited else None,
    )  # fmt: skip


@token_choice_of.register
def _(router: NoisyTopK) -> TokenChoice:
    if router.hidden_weight is not None:
        raise Unsupported(
            "its router has a hidden layer, and other programs support routing by one linear projection only"
        )
    return TokenChoice(router=router.weight, k=router.k, normalize=router.order == "select")


@token_choice_of.register
def _(router: Compete) -> TokenChoice:
    return TokenChoice(router=router.weight, k=router.k)


@token_choice_of.register
def _(router: Frozen) -> TokenChoice:
    return TokenChoice(router=router.weight, k=router.k)


@token_choice_of.register
def _(router: GShard) -> TokenChoice:
    if router.eval_random:
        raise Unsupported("it drops the second expert at random in evaluation too (eval_random=True)")
    return TokenChoice(router=router.weight, k=2)


@token_choice_of.register
def _(router: SparseMixer) -> TokenChoice:
    return TokenChoice(
        router=router.weight, k=router.k, score="sparsemixer", normalize=False, epsilon=router.epsilon
    )  # fmt: skip


@token_choice_of.register
def _(router: DefaultVector) -> TokenChoice:
    if torch.any(router.get_buffer("default")):
        raise Unsupported("its router adds default vectors of experts that are not chosen, and no other program does")
    return TokenChoice(router=router.weight, k=router.k, normalize=False)


@token_choice_of.register
def _(router: Capacity) -> TokenChoice:
    if math.isinf(router.eval_factor):
        return token_choice_of(router.router)
    raise Unsupported(
        "it drops rows beyond a capacity in evaluation, which no other program supports; to export without a capacity, "
        "call moeify.serve.serve_with(model, capacity=float('inf')) first"
    )
