"""Expert load by layer and domain: which experts the tokens of each domain are routed to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import default_data_collator

from moeify import statistics
from moeify.evaluate.objective import Batch, Samples
from moeify.evaluate.run import on_device, reading
from moeify.modes import in_evaluation
from moeify.progress import with_progress
from moeify.record import observe
from moeify.routing import Routing


@dataclass(frozen=True)
class ExpertLoad:
    """The load of every expert before any capacity limit, in rows, by layer and domain.

    Attributes:
        layers: names of the sparse layers.
        domains: names of the domains.
        rows: number of rows, (layers, domains, E).
    """

    layers: tuple[str, ...]
    domains: tuple[str, ...]
    rows: Float[Tensor, "layers domains E"]

    @property
    def share(self) -> Float[Tensor, "layers E"]:
        """Each expert's share of its layer's rows."""
        return statistics.load(self.rows.sum(1))

    @property
    def max_violation(self) -> Float[Tensor, "layers"]:
        """MaxVio, `moeify.statistics.max_violation`: 0 is even."""
        return statistics.max_violation(self.rows.sum(1))

    @property
    def dead(self) -> Int[Tensor, "layers"]:
        """The number of dead experts, `moeify.statistics.dead`."""
        return statistics.dead(self.rows.sum(1))

    @property
    def information(self) -> Float[Tensor, "layers"]:
        """Mutual information of expert and domain in bits per row, `moeify.statistics.information`."""
        return statistics.information(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, one entry per layer."""
        numbers = {"max_violation": self.max_violation, "dead": self.dead, "domain_bits": self.information}
        return {
            layer: {"share": self.share[i].tolist(), **{name: value[i].item() for name, value in numbers.items()}}
            for i, layer in enumerate(self.layers)
        }


@torch.no_grad()
def expert_load(
    model: nn.Module,
    samples: Samples,
    *,
    per_domain: int = 16,
    batch: int = 8,
    collate: Callable[[list[Any]], Batch] = default_data_collator,
) -> ExpertLoad:
    """Run a model over some samples of every domain and count the rows that are assigned to its experts.

    Args:
        model: the sparse model.
        samples: such as blocks of tokens.
        per_domain: the most samples of a domain.
        batch: samples that the model reads at once.
        collate: makes a batch of the model's inputs of samples.

    Raises:
        ValueError: the model has no sparse layer, none that sends tokens to experts, or layers with different numbers
            of experts.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    domain = ""

    def add(name: str, routing: Routing) -> None:
        if routing.assigned is not None:
            seen = layers.setdefault(name, {})
            seen[domain] = seen.get(domain, 0) + routing.assigned.float().cpu()

    handles = observe(model, add)
    device = next(model.parameters()).device
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    members: dict[str, list[int]] = {}
    for i in range(len(samples)):
        members.setdefault(samples.domain_of(i), []).append(i)
    try:
        with in_evaluation(model):
            for domain, indices in members.items():  # `add` reads the domain
                chunks = _chunks(indices[:: max(1, len(indices) // per_domain)][:per_domain], batch)
                for chosen in with_progress(chunks, f"expert load in {domain}, batches"):
                    given = on_device(collate([samples[i] for i in chosen]), device)
                    if not takes_labels:  # of which an encoder-decoder makes what its decoder reads
                        given.pop("labels", None)
                    with reading(model, given) as inputs:
                        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not layers:
        raise ValueError("no sparse layer sends its tokens to experts of their own, so there is no load to count")
    if len({len(rows) for seen in layers.values() for rows in seen.values()}) != 1:
        raise ValueError("the sparse layers have different numbers of experts, so they do not fit into one table")
    rows = torch.stack([torch.stack([seen[name] for name in members]) for seen in layers.values()])
    return ExpertLoad(tuple(layers), tuple(members), rows)


def _chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
