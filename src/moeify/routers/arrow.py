"""Arrow: adapters are chosen by the input direction that each amplifies most, read from its weights, untrained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.kernels.cpu.packing import cached
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "arrow")
class Arrow(Router):
    """The k experts with the largest |token · prototype| (Arrow, arXiv 2405.11157).

        v_j = the right singular vector of B_j A_j to its largest singular value
        z_j = |u · v_j| / τ;  i = topk(z, k);  w = softmax(z[i])

    The token u is not normalised, so τ has to be chosen for the size of activations. Prototypes follow the experts:
    they are recomputed when A or B have changed, and are in no checkpoint.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        temperature: τ.

    Raises:
        ValueError: k outside 1..E; a temperature that is not positive; experts that are not LoRA, or that an adapter
            wraps; in `forward`, no experts at all.
    """

    settable_k = True
    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, k: int = 3, temperature: float = 1.0) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=False)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} divides similarities; choose temperature > 0")
        self.width, self.num_experts, self.k, self.temperature = width, num_experts, k, temperature
        self.register_buffer("constant", None, persistent=False)

    def attach(self, experts: Any) -> None:
        """Keep a reference to the experts, whose weights are the router."""
        if (around := getattr(experts, "module", None)) is not None:  # `experts.Wrapped`
            raise ValueError(
                f"Arrow reads the direction of an expert from its weights, and {type(around).__name__} changes "
                "what experts compute without changing these; train lora_A and lora_B themselves, or put the adapter "
                "on modules that Arrow does not route"
            )
        if not hasattr(experts, "lora_A"):
            raise ValueError(
                f"Arrow reads the direction of an expert from low-rank matrices A and B, and {type(experts).__name__} "
                "has none; "
                "use experts=lora, or a router that is trained"
            )
        self._experts = (experts,)

    @property
    def prototypes(self) -> Float[Tensor, "E D"]:
        """v of every expert, in fp32; its sign is arbitrary."""
        if self.constant is not None:
            return self.constant
        if not self._experts:
            raise ValueError("this router was never given the experts that it reads; put it into a MoE, or attach them")
        a, b = self._experts[0].lora_A.detach(), self._experts[0].lora_B.detach()
        return cached(self._experts[0], "prototypes", [a, b], lambda: input_directions(a, b))

    @contextmanager
    def constant_prototypes(self) -> Iterator[None]:
        """Context manager in which the prototypes are a buffer, for graphs: few programs find singular vectors."""
        self.constant = self.prototypes
        try:
            yield
        finally:
            self.constant = None

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token along the prototypes."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.prototypes).abs() / self.temperature
        best, indices = k_best(logits, self.k)
        return tokens.assign(
            indices, best.softmax(-1), self.num_experts, Evidence(logits=logits, scores=logits.softmax(-1))
        )

    @property
    def mixing_flops(self) -> int:
        """A token is multiplied by every prototype; these are not parameters, so no other count has them."""
        return 2 * self.num_experts * self.width

    def extra_repr(self) -> str:
        """Experts per token, and the temperature."""
        return f"experts={self.num_experts}, k={self.k}, temperature={self.temperature}"


def input_directions(a: Float[Tensor, "E r D"], b: Float[Tensor, "E O r"]) -> Float[Tensor, "E D"]:
    """The right singular vector of every B A to its largest singular value, exactly, in fp32.

    With Aᵀ = Q R and B = Q' R' it is Q times that of the small matrix R' Rᵀ; B A itself is never formed.
    """
    with torch.autocast(a.device.type, enabled=False):
        q, r = torch.linalg.qr(a.float().mT)
        small = torch.linalg.qr(b.float()).R @ r.mT  # (E, r, r)
        return (q @ torch.linalg.svd(small, full_matrices=False).Vh.mT)[..., 0]
