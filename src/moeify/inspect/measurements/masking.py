"""Rise of the loss when the outputs of one expert are masked: its causal importance, beside its load."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.inspect.measurements.layer_inputs import parameters_of, run
from moeify.inspect.trace import Trace
from moeify.layers import SparseLayer, sparse_layers
from moeify.modes import in_evaluation
from moeify.progress import with_progress


@dataclass(frozen=True)
class Masked:
    """The effect of masking one expert.

    Attributes:
        layer: its layer's name.
        expert: its number.
        load: its load over the fair share.
        rise: of the loss of every sequence, in nats per token.
    """

    layer: str
    expert: int
    load: float
    rise: Float[Tensor, "S"]


def chosen_experts(trace: Trace, most: int = 48) -> list[tuple[str, int, float]]:
    """Experts of small, middling and large load in up to 8 layers: layer, expert, load over the fair share."""
    layers = [layer for layer in trace if layer.k and int(layer.assigned.sum())]
    count = min(len(layers), 8)
    kept = [layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)]
    found = []
    for layer in kept:
        load = layer.assigned / layer.assigned.sum() * layer.num_experts
        order = load.argsort(descending=True).tolist()
        wanted = max(1, min(len(order), most // count))
        places = {round(i * (len(order) - 1) / max(1, wanted - 1)) for i in range(wanted)}
        found += [(layer.name, order[i], float(load[order[i]])) for i in sorted(places)]
    return found


@torch.no_grad()
def masked_losses(
    model: nn.Module, batches: Iterable[Any], experts: Sequence[tuple[str, int, float]]
) -> tuple[Float[Tensor, "S"], list[Masked]]:
    """The loss of every sequence, and how it rises when single experts are masked: their outputs are 0.

    Args:
        model: one that returns logits for its `input_ids` or `labels`.
        batches: inputs by name.
        experts: layer, number and load of those that are masked, one by one.

    Raises:
        ValueError: a model that returns no logits, or experts whose parameters are not separate.
    """
    layers, kept = sparse_layers(model), list(batches)
    with in_evaluation(model):
        whole = _losses(model, kept)
        found = []
        for layer, expert, load in with_progress(experts, "masked experts"):
            with without_expert(layers[layer], expert):
                found.append(Masked(layer, expert, load, _losses(model, kept) - whole))
    return whole, found


@contextmanager
def without_expert(layer: SparseLayer, expert: int) -> Generator[None]:
    """Context manager in which the parameters of one expert, and so its outputs, are 0; the router chooses as before.

    Raises:
        ValueError: the experts do not have separate parameters.
    """
    parts = parameters_of(layer, expert)
    before = [part.clone() for part in parts]
    try:
        for part in parts:
            part.zero_()
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.copy_(old)


def _losses(model: nn.Module, batches: Sequence[Any]) -> Float[Tensor, "S"]:
    """Mean negative log-likelihood of the tokens of every sequence."""
    found = []
    for batch in batches:
        inputs = batch if isinstance(batch, Mapping) else {}
        targets = next((inputs[name] for name in ("labels", "decoder_input_ids", "input_ids") if name in inputs), None)
        logits = getattr(run(model, batch), "logits", None)
        if targets is None or logits is None or logits.shape[:-1] != targets.shape or targets.dim() != 2:
            raise ValueError(
                f"{type(model).__name__} returns no logits for each of its ids, so it has no loss to compare"
            )
        wanted = targets[:, 1:].to(logits.device)
        if (mask := inputs.get("attention_mask")) is not None:
            wanted = wanted.masked_fill(mask[:, 1:].to(logits.device) == 0, -100)
        loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, reduction="none", ignore_index=-100)
        found.append(loss.sum(1) / (wanted != -100).sum(1).clamp_min(1))
    return torch.cat(found).cpu()
