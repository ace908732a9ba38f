"""Noisy top-k gating: noise on the logits explores experts, and makes the expected load differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence

ExpectedLoad = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@register("expected_load", "of_others")
def of_others(
    clean: Float[Tensor, "T E"], noisy: Float[Tensor, "T E"], std: Float[Tensor, "T E"], k: int
) -> Float[Tensor, "E"]:
    """Σ_x Φ((x W_j - the k-th largest of the other noisy logits) / σ_j(x)), for k < E (Shazeer et al., eqs. 8-10)."""
    top = noisy.topk(k + 1, dim=-1).values
    kth, next_one = top[:, k - 1 : k], top[:, k : k + 1]
    others_kth = torch.where(noisy >= kth, next_one, kth)
    return torch.special.ndtr((clean - others_kth) / std.clamp_min(1e-6)).sum(0)


@register("expected_load", "of_all")
def of_all(
    clean: Float[Tensor, "T E"], noisy: Float[Tensor, "T E"], std: Float[Tensor, "T E"], k: int
) -> Float[Tensor, "E"]:
    """Σ_x Φ((x W_j - the k-th largest of all noisy logits) / σ_j(x)) (V-MoE, appendix A.2, and the authors' code).

    A chosen expert is compared with a threshold that its own noise may have set, so that the k-th choice wins half of
    the redraws for any scores of the others.
    """
    kth = noisy.topk(k, dim=-1).values[:, -1:]
    return torch.special.ndtr((clean - kth) / std.clamp_min(1e-6)).sum(0)


@register("router", "noisy")
class NoisyTopK(Router):
    """The k experts of the largest noisy logits (Shazeer et al. 2017, eqs. 3-5 and appendix A; V-MoE, eq. 1).

        H(x) = x W + ε · σ(x),   ε ~ N(0, 1) in training, 0 in evaluation
        σ(x) = softplus(x W_noise) + floor  if `noise` is "learned", else the constant `noise`
        g    = softmax(the k largest of H)          with order="select"   (Shazeer)
        g    = the k largest of softmax(H)          with order="softmax"  (V-MoE)

    In training, and for k < E, the decision keeps the expected load, Σ_x P(another draw of ε_j leaves H_j among the k
    largest), whose CV², `moeify.losses.load_loss`, is a loss with a gradient. Shazeer and V-MoE compute it differently.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        noise: standard deviation of the noise: learned, a number, or "1/E" (V-MoE).
        order: whether the softmax is over the chosen logits, or over all before the choice.
        expected_load: how the expected load is computed: `of_others` (Shazeer) or `of_all` (V-MoE).
        hidden: clean logits are tanh(x W) V with E hidden units (LLaMA-MoE), and not x W.
        floor: added to the standard deviation of a learned noise (LLaMA-MoE).

    Raises:
        ValueError: k outside 1..E; k = 1 with the softmax over the one chosen logit; a constant noise that is not
            positive; a floor that is negative.
    """

    settable_k = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        noise: float | Literal["learned", "1/E"] = "learned",
        order: Literal["select", "softmax"] = "select",
        expected_load: ExpectedLoad = of_others,
        hidden: bool = False,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=order == "select")
        if noise == "1/E":
            noise = 1 / num_experts
        if noise != "learned" and not (isinstance(noise, float | int) and noise > 0):
            raise ValueError(
                f"noise={noise!r} is not a standard deviation; choose noise > 0, 'learned' or '1/E', or TopK for none"
            )
        if floor < 0:
            raise ValueError(f"floor={floor} cannot be added to a standard deviation; choose floor >= 0")
        self.num_experts, self.k, self.noise, self.order, self.floor = num_experts, k, noise, order, floor
        self.expected_load = expected_load
        self.weights_sum_to_one = order == "select"
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        self.hidden_weight = nn.Parameter(torch.empty(num_experts, num_experts)) if hidden else None
        if self.hidden_weight is not None:  # both as nn.Linear draws them: a product of two zeros would not learn
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
            nn.init.kaiming_uniform_(self.hidden_weight, a=5**0.5)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, width)) if noise == "learned" else None

    def extra_repr(self) -> str:
        """The experts, the choice and the noise."""
        return f"{super().extra_repr()}, noise={self.noise!r}, order={self.order!r}"

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token by its noisy logits."""
        tokens = real_tokens(x, context)
        clean = project(tokens.x, self.weight)
        if self.hidden_weight is not None:
            clean = project(clean.tanh(), self.hidden_weight)
        noisy, load = self._add_noise(clean, tokens.x) if self.training else (clean, None)
        scores = noisy.softmax(-1)
        best, indices = k_best(noisy, self.k)
        topk_weights = best.softmax(-1) if self.order == "select" else scores.gather(-1, indices)
        evidence = Evidence(logits=clean, scores=scores, expected_load=load)
        return tokens.assign(indices, topk_weights, self.num_experts, evidence)

    def _add_noise(
        self, clean: Float[Tensor, "T E"], tokens: Float[Tensor, "T D"]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "E"] | None]:
        """The noisy logits, and the expected load."""
        if self.noise_weight is None:
            std = torch.full_like(clean, float(self.noise))
        else:
            std = F.softplus(project(tokens, self.noise_weight)) + self.floor
        noisy = clean + torch.randn_like(clean) * std
        return noisy, self.expected_load(clean, noisy, std, self.k) if self.k < self.num_experts else None
