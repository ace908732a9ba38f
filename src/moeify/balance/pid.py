"""Rules that move biases in proportion to an expert's missing load: a PID controller, or its proportional term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.balance.rules import Rule
from moeify.registry import register
from moeify.routing import Assignment


@register("controller", "proportional")
@dataclass(frozen=True)
class Proportional(Rule):
    """b_j ← b_j + rate · e_j, e_j = target share - share_j: P of a PID controller (LongCat-Flash, arXiv 2509.01322).

    Shares are of all rows. Where zero-computation experts (`Zero`, `Identity`) follow the `real` ones, the target share
    of each real expert is k / (K · real), so that a token uses k real experts on average; the biases of the
    zero-computation experts do not move.

    Attributes:
        rate: shares are of the size of 1 / E, so the rate that moves a bias by 1e-3 grows with E.
        real: the number of real experts, which come first; all experts if not given.
        k: the target number of real experts per token; K if not given.
    """

    rate: float = 1e-2
    real: int | None = None
    k: float | None = None

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The rows assigned to each expert, and the routed tokens.

        Raises:
            ValueError: more real experts than there are, or a k for a decision without a fixed number of choices.
        """
        if self.real is not None and not 1 <= self.real <= len(bias):
            raise ValueError(f"real={self.real} experts out of {len(bias)}; choose 1 <= real <= {len(bias)}")
        if routing.choices is None:
            if self.k is not None:
                raise ValueError("a wanted number of real experts needs a router that chooses K experts per token")
            return {"load": routing.assigned.float()}
        return {"load": routing.assigned.float(), "tokens": routing.counts.new_tensor(routing.tokens).float()}

    def error(self, seen: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """e: target share minus share of the rows of each expert; 0 for zero-computation experts."""
        load = seen["load"]
        rows = load.sum().clamp_min(1)
        real = len(load) if self.real is None else self.real
        wanted = 1.0 if self.k is None else self.k * seen["tokens"] / rows  # k / K
        error = wanted / real - load / rows
        return torch.where(torch.arange(len(load), device=load.device) < real, error, 0.0)

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """One step towards the target shares."""
        return bias + self.rate * self.error(seen)


@register("controller", "pid")
@dataclass(frozen=True)
class PID(Rule):
    """b_j ← b_j + rate · (e_j + integral · Σ e_j + derivative · (e_j - e_j')), e as in `Proportional`.

    The sum is over all steps up to this one, e' is of the step before; the first step has no derivative. LongCat-Flash
    (arXiv 2509.01322) names a PID controller and gives its proportional term alone; the other two are textbook terms.
    b itself is a sum, so the proportional term already removes a constant error. Where loads follow biases at once, the
    other two terms increase the oscillation about balance; the integral removes the lag behind loads that drift.

    Attributes:
        rate: as of `Proportional`.
        integral: weight of the sum of errors.
        derivative: weight of the change of the error.
        real: as of `Proportional`.
        k: as of `Proportional`.
    """

    rate: float = 1e-2
    integral: float = 0.0
    derivative: float = 0.0
    real: int | None = None
    k: float | None = None

    @property
    def _proportional(self) -> Proportional:
        return Proportional(self.rate, self.real, self.k)

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The same quantities as `Proportional`.

        Raises:
            ValueError: as of `Proportional`.
        """
        return self._proportional.observe(routing, unbiased, bias)

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """One step of the controller; the sum and the last error are kept in `memory`, in fp32."""
        error = self._proportional.error(seen)
        total = memory.get("total", torch.zeros_like(error)).to(error.device) + error
        change = error - memory.get("error", error).to(error.device)
        memory["total"], memory["error"] = total, error
        return bias + self.rate * (error + self.integral * total + self.derivative * change)
