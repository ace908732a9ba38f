"""Routing by similarity between a sequence and a centroid of each expert's training data."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k, check_per
from moeify.routing import Assignment, Evidence


@register("router", "similarity")
class Similarity(Router):
    """One decision per sequence, by cosines with a centroid of each expert's own data.

        z_j = cos(mean of u over the sequence, c_j) / τ;  i = topk(z, k);  w = softmax(z[i])

    With k = E experts are merged by similarity, with k = 1 the nearest is retrieved: the baselines of PHATGOOSE
    (arXiv 2402.05859). Nothing is trained; `moeify.compose.set_centroids` computes c from examples.

    Args:
        width: D.
        num_experts: E.
        k: experts per sequence, E if not given.
        temperature: τ.
        per: decide once for all tokens of a sequence, or for every token; only the latter looks at no later token.

    Attributes:
        centroids: c, (E, D) in fp32; random until they are set, and saved with the model.

    Raises:
        ValueError: k outside 1..E; a temperature that is not positive.
    """

    settable_k = True
    weights_sum_to_one = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int | None = None,
        temperature: float = 1.0,
        per: Literal["token", "sequence"] = "sequence",
    ) -> None:
        super().__init__()
        k = num_experts if k is None else k
        check_k(k, num_experts, normalize=False)
        check_per(per)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} divides similarities; choose temperature > 0")
        self.num_experts, self.k, self.temperature, self.per = num_experts, k, temperature, per
        self.causal = per == "token"
        self.register_buffer("centroids", torch.randn(num_experts, width))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route all real tokens of a sequence, or each by itself, to the experts with the nearest centroids."""
        tokens = real_tokens(x, context)
        units, ids, which = tokens.x.float(), tokens.sequence_id, torch.arange(len(tokens.x), device=x.device)
        if self.per == "sequence":
            ids, which = tokens.sequence_id.unique(return_inverse=True)
            units = units.new_zeros(len(ids), x.shape[-1]).index_add(
                0, which, units
            )  # the length of a sum does not affect a cosine
        logits = project(F.normalize(units, dim=-1), F.normalize(self.centroids, dim=-1)) / self.temperature
        best, indices = k_best(logits, self.k)
        evidence = Evidence(logits=logits, scores=logits.softmax(-1), sequence_id=ids)
        return tokens.assign(indices[which], best.softmax(-1)[which], self.num_experts, evidence)

    def extra_repr(self) -> str:
        """The settings of the choice."""
        return f"experts={self.num_experts}, k={self.k}, temperature={self.temperature}, per={self.per!r}"
