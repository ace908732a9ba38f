"""Balance losses whose gradient does not depend on the number of micro-batches and ranks.

With f_j fixed, the loss of a step is linear in its tokens:

    loss = mean over layers of  E · Σ_j f_j · P_j,        P_j = Σ over the step's real tokens of p_j / their number

so each micro-batch may add its own tokens' part, divided by the number of tokens of the whole step. That is exact if
f_j is known before the step: with scope `global` it is the share of rows assigned to expert j over the whole *previous*
step, all micro-batches and ranks. The lag of one step is the price; in the first step f_j = 1 / E, whose gradient is
zero. Global-batch balance is the subject of arXiv 2501.11873.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify import losses
from moeify.ranks import all_reduce
from moeify.routing import Assignment, Routing
from moeify.train.arguments import Loss, Scope, SparseArguments, at

Decisions = Sequence[tuple[str, Routing]]
UNITS = ("attention_mask", "decoder_attention_mask", "input_ids", "labels", "rows")


def count_decisions(inputs: Mapping[str, Any]) -> dict[str, int]:
    """How many decisions a router may have to make for a batch: one per real token, per label, or per row."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    sizes = dict.fromkeys(UNITS, 0)
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in tensors and tensors[name].dim() == 2:
            sizes[name] = int(tensors[name].bool().sum())
    for name in ("input_ids", "inputs_embeds"):
        if name in tensors:
            sizes["input_ids"] = tensors[name].shape[:2].numel()
    if "labels" in tensors:
        sizes["labels"] = tensors["labels"].shape[:2].numel()
    sizes["rows"] = next((len(tensor) for tensor in tensors.values()), 0)
    return sizes


class Watch:
    """Collects the decisions of one micro-batch; the trainer registers `observe` by `moeify.record.observe`."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the decisions of earlier forward passes."""
        self.seen: list[tuple[str, Routing]] = []
        self.without_gradient = 0

    def observe(self, name: str, routing: Routing) -> None:
        """Keep a decision that was made with gradients on."""
        if torch.is_grad_enabled():
            self.seen.append((name, routing))
        else:
            self.without_gradient += 1

    def take(self) -> list[tuple[str, Routing]]:
        """The decisions of this micro-batch, once.

        Raises:
            ValueError: there is none that a loss could act on.
        """
        seen, hidden = self.seen, self.without_gradient
        self.forget()
        if not seen and hidden:
            raise ValueError(
                "the routers decided without gradients, so neither loss nor controller can balance them: re-entrant "
                "activation checkpointing does that; pass use_reentrant=False (SparseTrainer does), or "
                "model.gradient_checkpointing_enable({'use_reentrant': False, 'context_fn': keep_decisions})"
            )
        if not seen:
            raise ValueError(
                "no routing decision arrived in this forward pass, so balance is not wired: the sparse layers were not "
                "called through the model that the trainer has; pass the model that holds them, or "
                "SparseArguments(balance=0)"
            )
        return seen


@dataclass
class StepLoss:
    """The balance and z-loss of an optimizer step, cut into the parts of its micro-batches.

    Attributes:
        scope: over what f is measured.
        assigned: rows assigned to every expert of every layer in the previous step; saved with a checkpoint.
    """

    scope: Scope = "global"
    assigned: dict[str, Float[Tensor, "E"]] = field(default_factory=dict)
    _this_step: dict[str, Float[Tensor, "E"]] = field(default_factory=dict)
    _total: dict[str, float] = field(default_factory=dict)
    _gathered: bool = False

    def begin(
        self, batches: Sequence[Mapping[str, Any]], device: torch.device | str = "cpu", *, copies: int = 1
    ) -> dict[str, float]:
        """Count what the micro-batches of a step hold, over all ranks.

        Args:
            batches: of this rank.
            device: where ranks exchange their counts.
            copies: ranks that receive the same batches, as in tensor parallelism.
        """
        sizes = [count_decisions(batch) for batch in batches]
        here = torch.tensor([sum(size[unit] for size in sizes) for unit in UNITS], dtype=torch.float32, device=device)
        self._total = dict(zip(UNITS, (all_reduce(here) / copies).tolist(), strict=True))
        self._this_step, self._gathered = {}, False
        return self._total

    def weighted(
        self, sparse: SparseArguments, step: int, decisions: Decisions, sizes: Mapping[str, int]
    ) -> Float[Tensor, ""] | None:
        """This micro-batch's part of the sum of all balancing losses with their weights, None where all of these are 0.

        Args:
            sparse: the losses and their weights; those that adapt to the routing observe it.
            step: optimizer steps done, of which weights may be schedules.
            decisions: of this micro-batch.
            sizes: of this micro-batch, as `count_decisions` returns them.

        Raises:
            ValueError: as of `balance` and `z`.
        """
        parts = []
        if (weight := at(sparse.balance, step)) != 0:
            parts.append(weight * self.balance(decisions, sizes))
        if (weight := at(sparse.z, step)) != 0:
            parts.append(weight * self.z(decisions, sizes))
        for scheduled, loss in sparse.losses:
            if (weight := at(scheduled, step)) != 0:
                parts.append(weight * self.further(loss, decisions, sizes))
        for target in sparse.targets:
            for _, routing in decisions:
                target.observe(routing)
        return torch.stack([part.to(parts[0].device) for part in parts]).sum() if parts else None

    def balance(self, decisions: Decisions, sizes: Mapping[str, int]) -> Float[Tensor, ""]:
        """This micro-batch's part of the mean over layers of E · Σ_j f_j · P_j; 1.0 per step is perfect.

        Raises:
            ValueError: no layer keeps scores, or all their routers are frozen.
        """
        scored = [(n, r, r.scores) for n, r in decisions if isinstance(r, Assignment) and r.scores is not None]
        if not scored:
            raise ValueError(
                f"a balance loss was asked for, but none of {_names(decisions)} keeps the scores of its router, so it "
                "is not wired; pass SparseArguments(balance=0), and a controller if the routers have a selection bias"
            )
        if not any(scores.requires_grad for *_, scores in scored):
            raise ValueError(
                f"a balance loss was asked for, but the scores of {_names(decisions)} have no gradient: the "
                "routers and all layers before them are frozen; unfreeze them, or pass SparseArguments(balance=0)"
            )
        return self._mean([self._of_layer(name, r) * self._part(len(scores), sizes) for name, r, scores in scored])

    def z(self, decisions: Decisions, sizes: Mapping[str, int]) -> Float[Tensor, ""]:
        """This micro-batch's part of the mean over layers of the z-loss.

        Raises:
            ValueError: no layer keeps logits.
        """
        known = [(r, len(r.logits)) for _, r in decisions if r.logits is not None]
        if not known:
            raise ValueError(f"a z-loss was asked for, but none of {_names(decisions)} keeps logits; pass z=0")
        return self._mean([losses.z(r) * self._part(made, sizes) for r, made in known])

    def further(self, loss: Loss, decisions: Decisions, sizes: Mapping[str, int]) -> Float[Tensor, ""]:
        """This micro-batch's part of the mean over layers and micro-batches of another loss of a decision."""
        return self._mean([loss(routing) * self._part(_made(routing), sizes) for _, routing in decisions])

    @torch.no_grad()
    def add(self, decisions: Decisions, *, counts: bool = True) -> None:
        """Store the rows that this micro-batch assigned to the experts, for the f of the next step.

        A micro-batch of padding only adds zeros, since all ranks sum the same layers.
        """
        for name, routing in decisions:
            if routing.assigned is not None:
                rows = routing.assigned.float() * counts
                self._this_step[name] = self._this_step[name] + rows if name in self._this_step else rows

    def gather(self) -> None:
        """Sum the rows assigned to the experts over all ranks ahead of `end`, which then needs no other rank."""
        if not self._gathered:
            self._this_step = {name: all_reduce(rows) for name, rows in sorted(self._this_step.items())}
        self._gathered = True

    def end(self) -> None:
        """The optimizer has stepped: the rows assigned to the experts, over all ranks, are the next step's f."""
        self.gather()
        self.assigned, self._this_step, self._gathered = self._this_step, {}, False

    def _of_layer(self, name: str, routing: Assignment) -> Float[Tensor, ""]:
        if self.scope == "global":
            assigned = self.assigned.get(name, torch.ones(len(routing.counts)))
            return losses.balance(routing, assigned=assigned.to(routing.counts.device))
        return losses.balance(routing, self.scope)

    def _part(self, made: int, sizes: Mapping[str, int]) -> float:
        """The share of the step's decisions that were made in this micro-batch."""
        unit = next((unit for unit in UNITS if sizes[unit] == made), "rows")
        if not self._total[unit]:
            raise ValueError(
                f"the model was called with {unit}, which the micro-batches that were counted before the step lack; "
                "count what the model is called with, by `begin` or by the trainer's `model_inputs`"
            )
        return sizes[unit] / self._total[unit]

    @staticmethod
    def _mean(parts: list[Tensor]) -> Float[Tensor, ""]:
        return torch.stack([part.to(parts[0].device) for part in parts]).mean()


def _made(routing: Routing) -> int:
    """How many decisions of tokens or sequences a routing holds, 0 if it does not record them."""
    return next((len(kept) for kept in (routing.logits, routing.scores) if kept is not None), 0)


def _names(decisions: Decisions) -> str:
    names = sorted({name for name, _ in decisions})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more layers" if len(names) > 3 else "")


def disable_own_loss(model: nn.Module) -> bool:
    """Turn off the balance loss that transformers adds to the loss of its MoE models: it grows with accumulation."""
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    for config in on:
        config.output_router_logits = False
    return bool(on)
