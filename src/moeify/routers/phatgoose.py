"""PHATGOOSE: routing among independently trained adapters, each with a gate that was trained after it, alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "phatgoose")
class Phatgoose(Router):
    """The k experts whose gates lie nearest to the token, token by token and layer by layer (arXiv 2402.05859).

        z_j = v̂_j · û / √D          û, v̂_j: mean 0 and variance 1 over the width
        s   = softmax(z);  i = topk(s, k);  w = s[i] / Σ s[i]

    A gate is trained beside its own adapter alone, by `moeify.train.train_gates`; a library grows by one row. With mean
    activations of domains as rows it is the paper's baseline of that name.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.

    Attributes:
        weight: the gates, (E, D); drawn at random until `moeify.compose.set_gates` puts trained ones in.

    Raises:
        ValueError: k outside 1..E.
    """

    settable_k = True
    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=False)
        self.num_experts, self.k = num_experts, k
        self.weight = nn.Parameter(torch.randn(num_experts, width))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token by standardised products."""
        tokens = real_tokens(x, context)
        logits = project(_standardised(tokens.x), _standardised(self.weight)) / x.shape[-1] ** 0.5
        best, indices = k_best(logits, self.k)  # softmax of the kept is the softmax of all, renormalised
        return tokens.assign(
            indices, best.softmax(-1), self.num_experts, Evidence(logits=logits, scores=logits.softmax(-1))
        )

    def extra_repr(self) -> str:
        """Experts per token."""
        return f"experts={self.num_experts}, k={self.k}"


def _standardised(v: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return F.layer_norm(v.float(), v.shape[-1:])
