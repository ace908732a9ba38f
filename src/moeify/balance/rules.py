"""Rules: how a controller updates the selection bias of a layer from the load of its experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.registry import register
from moeify.routing import Assignment


class Rule(ABC):
    """How the selection bias of one layer is updated from its routing decisions since the last optimizer step.

    Attributes:
        needs_all: whether the rule is right only where a token may use every expert; `control` refuses it elsewhere.
    """

    needs_all: ClassVar[bool] = False

    @abstractmethod
    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The quantities to sum over the micro-batches and ranks of a step.

        Args:
            routing: the decision.
            unbiased: the values that the experts are chosen by, without the bias: scores, or logits.
            bias: the bias that the decision was made with.
        """

    @abstractmethod
    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """The new bias.

        Args:
            bias: the bias that the step was made with.
            seen: the sums of what was observed.
            memory: the rule's state for this layer between steps, such as a momentum: empty before the first step,
                written in place, saved with a checkpoint.
        """


@register("controller", "sign")
@dataclass(frozen=True)
class Sign(Rule):
    """b_j ← b_j + rate · sign(mean load - load_j): loss-free balancing (arXiv 2408.15664, algorithm 1; DeepSeek-V3).

    Attributes:
        rate: DeepSeek-V3 uses 1e-3 over hundreds of thousands of steps; use about 1e-2 for short runs.
    """

    rate: float = 1e-3

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The rows assigned to each expert."""
        return {"load": routing.assigned.float()}

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """One step towards the underloaded experts."""
        load = seen["load"]
        return bias + self.rate * torch.sign(load.mean() - load)


@register("controller", "quantile")
@dataclass(frozen=True)
class Quantile(Rule):
    """The bias that would have balanced the last batch: a quantile over its tokens (J. Su 2026, kexue.fm 11619).

    With β = -b: α_i is the (k+1)-th largest of s_i - β over experts, and β_j the (T·k/E + 1)-th largest of
    s_ij - α_i over tokens. Averaged over the micro-batches of a step. In group-limited routing a token cannot
    choose every expert, which α ignores; such routers are refused.

    Attributes:
        ema: weight of the old bias in the moving average.
    """

    ema: float = 0.0
    needs_all: ClassVar[bool] = True

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The balancing bias of this micro-batch, and a count of 1.

        Raises:
            ValueError: the decision keeps no scores or has no fixed k, or every expert is chosen anyway.
        """
        if unbiased is None or routing.choices is None:
            raise ValueError("quantile balancing needs a router that keeps its scores and chooses k experts per token")
        s = unbiased.detach().float()
        decisions, num_experts = s.shape
        k = routing.choices.k
        if k >= num_experts:
            raise ValueError(f"quantile balancing needs k < E, and every token already uses all {num_experts} experts")
        alpha = (s + bias).topk(k + 1, dim=-1).values[:, -1:]
        rank = min(decisions * k // num_experts + 1, decisions)
        beta = (s - alpha).topk(rank, dim=0).values[-1]
        return {"bias": -beta, "batches": s.new_ones(())}

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """The average of the biases of the micro-batches, centred: a common shift of the bias changes no choice."""
        wanted = seen["bias"] / seen["batches"]
        return self.ema * bias + (1 - self.ema) * (wanted - wanted.mean())


@register("controller", "smebu")
@dataclass(frozen=True)
class SMEBU(Rule):
    """Soft-clamped momentum: b_j ← b_j + m_j (Arcee Trinity Large, arXiv 2602.17004).

        v_j = (mean load - load_j) / mean load
        δ_j = rate · tanh(κ v_j), minus its mean
        m_j ← β m_j + (1 - β) δ_j

    Attributes:
        rate: the largest step, λ.
        kappa: κ; the larger, the smaller the load violation at which the step saturates.
        beta: β, the decay of the momentum.
    """

    rate: float = 5e-4
    kappa: float = 2.0
    beta: float = 0.5

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The rows assigned to each expert."""
        return {"load": routing.assigned.float()}

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """One step with momentum, which is kept in `memory`."""
        load = seen["load"]
        delta = self.rate * torch.tanh(self.kappa * (load.mean() - load) / load.mean())
        momentum = memory.get("momentum", torch.zeros_like(delta)).to(delta.device)
        memory["momentum"] = self.beta * momentum + (1 - self.beta) * (delta - delta.mean())
        return bias + memory["momentum"]
