"""An adaptive weight of the l1 loss that holds the number of experts per token at a target (ReMoE)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeify import ranks
from moeify.routing import Routing


@dataclass
class SparsityTarget:
    """λ ← λ · factor where more than k of E experts run, λ / factor where fewer do (ReMoE, arXiv 2412.14711).

    The weight of `moeify.losses.l1`. By hand, `observe` every decision of a step, then `step`:

        weight = SparsityTarget(k=2)
        loss = task + weight.value * l1(routing, k=2)

    or in the trainer, `SparseArguments(losses=[(SparsityTarget(k=2), partial(l1, k=2))])`, which also saves it.

    Attributes:
        k: the target number of experts per token, on average over layers, tokens, micro-batches and ranks.
        factor: how much the weight changes per step.
        value: the weight, λ.

    Raises:
        ValueError: k or the weight is not above 0, or the factor not above 1.
    """

    k: float
    factor: float = 1.2
    value: float = 1e-8
    _seen: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float32), repr=False)
    _gathered: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.k > 0 and self.factor > 1 and self.value > 0):
            raise ValueError(
                f"k={self.k}, factor={self.factor}, value={self.value}: the weight is controlled only with k > 0, "
                "factor > 1 and value > 0"
            )

    def __call__(self, step: int) -> float:
        """The weight, callable as a schedule; it depends on the observed decisions, not on the step."""
        return self.value

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Count the rows and tokens of one decision."""
        decisions = routing.scores if routing.logits is None else routing.logits
        if decisions is None:
            raise ValueError("this router keeps neither logits nor scores, so its sparsity cannot be measured")
        seen = torch.stack([routing.counts.sum().float(), routing.counts.new_tensor(len(decisions)).float()])
        self._seen = self._seen.to(seen.device) + seen

    def gather(self) -> None:
        """Sum the counts over all ranks ahead of `step`, which then needs no other rank and cannot fail."""
        if not self._gathered:
            ranks.all_reduce(self._seen)
        self._gathered = True

    def forget(self) -> None:
        """Drop the counts of a step that the optimizer does not take; the weight stays."""
        self._seen = torch.zeros_like(self._seen)
        self._gathered = False

    def step(self) -> None:
        """Move the weight by the counts of all ranks, and reset them; without counts it stays."""
        self.gather()
        rows, tokens = self._seen.tolist()
        self.forget()
        if rows > self.k * tokens:
            self.value *= self.factor
        elif rows < self.k * tokens:
            self.value /= self.factor
