"""Expert load and balance while a model trains: per layer, over all ranks, without a further forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify import statistics
from moeify.losses import probability
from moeify.ranks import all_reduce
from moeify.routing import Routing
from moeify.train.loss import Decisions

MAX_KEYS = 15
"""The most metrics that `summarize` returns, for any number of layers and experts."""


class Tally:
    """Sums of decisions: over the micro-batches and ranks of a step, then over the steps since the last log.

    Everything stays on the device until `drain`, and a step costs one collective.
    """

    def __init__(self) -> None:
        self.experts: dict[str, int] = {}
        self._copies = 1
        self._step: dict[str, Float[Tensor, "S"]] = {}
        self._steps: dict[str, Float[Tensor, "S"]] = {}
        self._violation: dict[str, Float[Tensor, "2"]] = {}

    def begin(self, experts: Mapping[str, int], *, copies: int = 1) -> None:
        """Reset all sums for these layers, in this order, also on ranks that do not run some of them in a step.

        Args:
            experts: E of every layer.
            copies: ranks that receive the same batches, as in tensor parallelism.
        """
        self.experts, self._copies = dict(experts), copies
        self._step, self._steps, self._violation = {}, {}, {}

    @torch.no_grad()
    def add(self, decisions: Decisions, *, counts: bool = True) -> None:
        """Add the rows that one micro-batch assigned to the experts; dense mixtures are balanced by construction.

        A micro-batch of padding only adds zeros, since all ranks sum the same layers.
        """
        for name, routing in decisions:
            if (assigned := routing.assigned) is not None:
                self.experts[name] = len(assigned)
                _add(self._step, name, _sums(routing, assigned) * counts)

    @torch.no_grad()
    def end_step(self) -> None:
        """The optimizer has stepped: add up its micro-batches over all ranks."""
        if not self.experts:
            return
        device = next(iter(self._step.values())).device if self._step else torch.get_default_device()
        sizes = [3 * experts + 4 for experts in self.experts.values()]
        nothing = (torch.zeros(size, device=device) for size in sizes)
        parts = [self._step.get(name, zeros).to(device) for name, zeros in zip(self.experts, nothing, strict=True)]
        total = all_reduce(torch.cat(parts)) / self._copies
        for (name, experts), sums in zip(self.experts.items(), total.split(sizes), strict=True):
            _add(self._steps, name, sums)
            _add(self._violation, name, _violation(sums[:experts]))
        self._step = {}

    def drain(self) -> dict[str, dict[str, Any]]:
        """The metrics of every layer that was called, over all steps since the last call, see `measure`."""
        sums, violation, self._steps, self._violation = self._steps, self._violation, {}, {}
        totals = {name: torch.cat([sums[name], violation[name]]).cpu() for name in sums}
        return {name: measure(total) for name, total in totals.items() if total.any()}


def _add(sums: dict[str, Tensor], name: str, new: Tensor) -> None:
    sums[name] = sums[name] + new if name in sums else new


def _violation(assigned: Float[Tensor, "E"]) -> Float[Tensor, "2"]:
    """MaxVio and 1, or 0 and 0 if there are no rows: to be added up and divided."""
    some = (assigned.sum() > 0).to(assigned.dtype)
    return torch.stack([statistics.max_violation(assigned) * some, some])


def _sums(routing: Routing, assigned: Int[Tensor, "E"]) -> Float[Tensor, "S"]:
    """S = 3E + 4: rows assigned, rows computed, probabilities; entropy, decisions; MaxVio of micro-batches, and 1."""
    assigned, counts = assigned.float(), routing.counts.float()
    violation = _violation(assigned)
    if routing.scores is None:
        return torch.cat([assigned, counts, torch.zeros_like(assigned), assigned.new_zeros(2), violation])
    p = probability(routing).detach()
    entropy = statistics.router_entropy(p).sum()
    return torch.cat([assigned, counts, p.sum(0), entropy.view(1), entropy.new_full((1,), len(p)), violation])


def measure(sums: Float[Tensor, "S"]) -> dict[str, Any]:
    """The metrics of one layer from its sums over steps.

    Of all rows together: `load_entropy` is divided by log E, and 1 is even; `load_cv` is the standard deviation of the
    load over its mean, 0 is even; `effective_experts` is exp(H) / E of the load's entropy H; `dead_experts` are those
    below 1 % of their fair share; `drop_rate` is the share of rows dropped by capacity; `rows` are those assigned to
    each expert. `max_vio` is max / mean load - 1 (arXiv 2408.15664) of each step's global batch, over all micro-batches
    and ranks, and `max_vio_micro` that of each micro-batch on its rank; both are means, and 0 is even.
    `router_entropy` is divided by log E; `balance` is E · Σ_j f_j · P_j, 1 is even, also where uniform scores hide dead
    experts. Without scores these two are omitted.
    """
    experts = (len(sums) - 6) // 3
    assigned, counts, p = sums[: 3 * experts].view(3, experts)
    entropy, decisions, micro, batches, violation, steps = sums[3 * experts :].tolist()
    metrics = {
        "load_entropy": float(statistics.load_entropy(assigned)),
        "load_cv": float(statistics.load_variation(assigned)),
        "effective_experts": float(statistics.effective_share(assigned)),
        "max_vio": violation / max(steps, 1),
        "max_vio_micro": micro / max(batches, 1),
        "dead_experts": float(statistics.dead(assigned)),
        "drop_rate": float(statistics.drop_rate(assigned, counts)),
    }
    if decisions:
        metrics["balance"] = float(experts * (statistics.load(assigned) * p).sum() / decisions)
        metrics["router_entropy"] = entropy / decisions / statistics.log_experts(experts)
    return metrics | {"rows": assigned.long().tolist()}


_WORST = {"load_entropy": min, "max_vio": max, "max_vio_micro": max, "dead_experts": max, "drop_rate": max}


def summarize(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """At most `MAX_KEYS` metrics: means over layers, the worst value of some, and which layer is loaded least evenly.

    `worst_layer` counts the layers from 0 in the order of the model.
    """
    if not layers:
        return {}
    kinds = sorted(set().union(*layers.values()) - {"rows"})
    values = {kind: [layer[kind] for layer in layers.values() if kind in layer] for kind in kinds}
    means = {kind: sum(v) / len(v) for kind, v in values.items()}
    worst = {f"{kind}_worst": pick(values[kind]) for kind, pick in _WORST.items()}
    entropies = values["load_entropy"]
    return means | worst | {"worst_layer": float(entropies.index(min(entropies)))}
