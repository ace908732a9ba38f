"""What a model loses when the outputs of one expert are masked: its causal importance, beside its load."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.inspect.measurements.effect import Measure, measure_for
from moeify.inspect.measurements.layer_inputs import parameters_of, run
from moeify.inspect.trace import Trace
from moeify.layers import SparseLayer, sparse_layers
from moeify.modes import fixed_randomness, in_evaluation
from moeify.progress import with_progress


@dataclass(frozen=True)
class Masked:
    """The effect of masking one expert.

    Attributes:
        layer: its layer's name.
        expert: its number.
        load: its load over the fair share.
        rise: of the measured value of every sequence, sample or batch.
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


@dataclass(frozen=True)
class Effects:
    """The effects of masking experts one by one.

    Attributes:
        measure: what is compared.
        whole: its values with all experts.
        masked: the experts whose weights compute something.
    """

    measure: Measure
    whole: Float[Tensor, "S"]
    masked: list[Masked]


@torch.no_grad()
def masked_effects(model: nn.Module, batches: Iterable[Any], experts: Sequence[tuple[str, int, float]]) -> Effects:
    """The loss, or the change of the outputs, when single experts are masked: their outputs are 0.

    Experts that have tokens and whose masking changes nothing are left out: they compute nothing, as LongCat-Flash's
    zero experts, or none of their tokens is in the batches.

    Args:
        model: any sparse model.
        batches: its inputs, with labels if the loss is to be that of the model.
        experts: layer, number and load of those that are masked, one by one.

    Raises:
        ValueError: outputs that cannot be compared, or experts whose parameters are not separate.
    """
    layers, kept = sparse_layers(model), list(batches)
    with in_evaluation(model), fixed_randomness(model):
        outputs = [run(model, batch) for batch in kept]
        measure = measure_for(model, kept, outputs)
        whole = torch.cat([measure.of(i, output) for i, output in enumerate(outputs)]).cpu()
        found = []
        for layer, expert, load in with_progress(experts, "masked experts"):
            with without_expert(layers[layer], expert):
                values = torch.cat([measure.of(i, run(model, batch)) for i, batch in enumerate(kept)]).cpu()
            if not load or not torch.equal(values, whole):
                found.append(Masked(layer, expert, load, values - whole))
    return Effects(measure, whole, found)


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
