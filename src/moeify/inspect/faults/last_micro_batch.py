"""Fault: load statistics that count only the last micro-batch of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.inspect.faults.finding import Finding, Inapplicable
from moeify.inspect.faults.observed import Observed
from moeify.layers import SparseLayer
from moeify.modes import fixed_randomness
from moeify.record import observe
from moeify.routing import Routing


def last_micro_batch(seen: Observed) -> Iterator[Finding]:
    """The expert load that a layer stores is that of the last micro-batch, not of the whole step.

    Every tensor of E numbers that a layer keeps outside its experts, as buffer or attribute, is read before and after
    some micro-batches in training mode. It is a load if it grew by the rows of all of them, or if it is those of the
    last one. A controller or a log that reads the latter sees 1/n of a step of n.
    """
    if len(seen.batches) < 2:
        raise Inapplicable("there is one batch")
    before = {name: _kept(layer) for name, layer in seen.layers.items()}
    rows = _run(seen)
    known = False
    for name, layer in seen.layers.items():
        last, whole = rows[name][-1], torch.stack(rows[name]).sum(0)
        for key, now in _kept(layer).items():
            grown = now - before[name].get(key, torch.zeros_like(now))
            if torch.equal(now, last) and not torch.equal(grown, whole):
                yield Finding(
                    layer=name,
                    cause="the load of the experts is that of the last micro-batch only",
                    evidence=f"{key} holds {int(now.sum())} rows after {len(rows[name])} micro-batches with "
                    f"{int(whole.sum())} rows",
                    fix="add up over the micro-batches of a step, and over ranks, and reset after the optimizer's step",
                )
            known = known or torch.equal(now, last) or torch.equal(grown, whole)
    if not known:
        raise Inapplicable("no layer keeps the load of its experts")


def _run(seen: Observed) -> dict[str, list[Float[Tensor, "E"]]]:
    """Run the batches in training mode, and return the rows of every layer, batch by batch."""
    model, rows = seen.model, {name: [] for name in seen.layers}

    def add(name: str, routing: Routing) -> None:
        if routing.assigned is not None:
            rows[name].append(routing.assigned.float().cpu())

    seen.require_finite()
    modes = [(module, module.training) for module in model.modules()]
    handles = observe(model, add)
    model.train()
    try:
        with fixed_randomness(model), torch.no_grad():
            for batch in seen.batches[:4]:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return {name: found or [torch.zeros(seen.layers[name].num_experts)] for name, found in rows.items()}


def _kept(layer: SparseLayer) -> dict[str, Float[Tensor, "E"]]:
    """The tensors of E numbers that a layer keeps outside its experts."""
    inside, found = set(layer.experts.modules()), {}
    for path, module in layer.module.named_modules():
        if module not in inside:
            for key, value in {**vars(module), **module._buffers}.items():
                is_state = isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
                if is_state and value.numel() == layer.num_experts:
                    found[f"{path}.{key}".lstrip(".")] = value.detach().float().flatten().cpu().clone()
    return found
