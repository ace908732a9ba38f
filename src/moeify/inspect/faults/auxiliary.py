"""Gradients of auxiliary losses at the router logits in a training step, and the loss definition that fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.inspect.faults.finding import Unknown
from moeify.inspect.faults.taps import detach_weights, require_taps, watch
from moeify.inspect.faults.training import Step
from moeify.layers import SparseLayer

Batch = Mapping[str, Any]


@dataclass
class Decided:
    """The decision of a router in one micro-batch of a step, and its gradient.

    Attributes:
        logits: its logits; of blocks of transformers those of padding too.
        chosen: the experts.
        real: which tokens are not padding.
        gradient: of the auxiliary losses with respect to the logits; zeros if there was none.
    """

    logits: Float[Tensor, "T E"]
    chosen: Int[Tensor, "T K"]
    real: Bool[Tensor, "T"]
    gradient: Float[Tensor, "T E"]


def auxiliary_gradients(
    model: nn.Module, layers: Mapping[str, SparseLayer], step: Step, batches: Sequence[Batch]
) -> dict[str, list[Decided]]:
    """Gradients of the auxiliary losses alone at the logits of every layer, for every micro-batch of a step.

    The weights of the rows are detached, so that the loss of the task does not reach the logits: what is left comes
    from balance losses and z-losses of any source. The step is run twice, as the loads of one may be the next
    one's f. Gradients of parameters are as before, and modes too.

    Raises:
        Unknown: hooks cannot access the logits of a layer.
    """
    for layer in layers.values():
        require_taps(layer)
    kept = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    cuts = [detach_weights(layer) for layer in layers.values()]
    try:
        _run(model, step, batches)
        found: dict[str, list[Decided]] = {name: [] for name in layers}
        masks = [batch.get("attention_mask") for batch in batches]
        watches = [h for name, layer in layers.items() for h in watch(layer, _keep(found[name], masks))]
        try:
            _run(model, step, batches)
        finally:
            for handle in watches:
                handle.remove()
    finally:
        for handle in cuts:
            handle.remove()
        for module, mode in modes:
            module.training = mode
        for p, gradient in kept:
            p.grad = gradient
    return found


def _run(model: nn.Module, step: Step, batches: Sequence[Batch]) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        step([dict(batch) for batch in batches])


def _keep(found: list[Decided], masks: Sequence[Tensor | None]) -> Callable[[Tensor, Tensor], None]:
    def see(logits: Tensor, chosen: Tensor) -> None:
        mask = masks[len(found)] if len(found) < len(masks) else None
        real = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if mask is not None and mask.numel() == len(logits):
            real = mask.flatten().bool().to(logits.device)
        decided = Decided(logits.detach().float(), chosen.detach(), real, torch.zeros_like(logits).float())
        found.append(decided)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: decided.gradient.copy_(gradient.detach().float()))

    return see


def size(decided: Sequence[Decided]) -> float:
    """The norm of the gradient of the logits, summed over micro-batches."""
    return sum(float(one.gradient.norm()) for one in decided)


@dataclass(frozen=True)
class Definition:
    """A definition of the balance loss E · Σ_j f_j · P_j.

    Attributes:
        pooled: f and P are taken over all layers together, and not in each.
        padded: padding counts as tokens.
        by_score: f counts the experts of the K largest scores, and not those chosen by bias and groups.
        score: what turns logits into P: `softmax`, or `sigmoid` divided by its sum.
    """

    pooled: bool
    padded: bool
    by_score: bool
    score: str

    def gradients(self, layers: Sequence[Decided]) -> list[Float[Tensor, "T E"]]:
        """The gradient of the logits of every layer, up to a factor."""
        leaves = [one.logits.clone().requires_grad_() for one in layers]
        with torch.enable_grad():
            parts = [self._parts(one, leaf) for one, leaf in zip(layers, leaves, strict=True)]
            f, p = zip(*parts, strict=True)
            each = torch.stack([(a * b).sum() for a, b in parts])
            loss = (_mean(f) * _mean(p)).sum() if self.pooled else each.mean()
        return list(torch.autograd.grad(loss, leaves))

    def _parts(self, one: Decided, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1) if self.score == "softmax" else F.normalize(logits.sigmoid(), p=1.0, dim=-1)
        counted = torch.ones_like(one.real) if self.padded else one.real
        chosen = scores.topk(one.chosen.shape[1], dim=-1).indices if self.by_score else one.chosen
        rows = chosen[counted].flatten().bincount(minlength=logits.shape[-1])
        return rows / rows.sum(), scores[counted].mean(0)


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(0)


def explain(layers: Sequence[Decided]) -> tuple[Definition, dict[Definition, float]]:
    """The definition whose gradient has the measured direction, and the cosine of each.

    Args:
        layers: what every layer decided in one and the same micro-batch.

    Raises:
        Unknown: layers of different sizes, or no definition has a cosine of 0.99, or two that differ explain it
            equally.
    """
    if len({one.logits.shape[-1] for one in layers}) > 1:
        raise Unknown("the layers have different numbers of experts")
    has_padding = any(not one.real.all() for one in layers)
    measured = torch.cat([one.gradient.flatten() for one in layers])
    cosines = {}
    for settings in product({False, len(layers) > 1}, {False, has_padding}, (False, True), ("softmax", "sigmoid")):
        definition = Definition(*settings)
        direction = torch.cat([g.flatten() for g in definition.gradients(layers)])
        cosines[definition] = float(F.cosine_similarity(measured, direction, dim=0))
    best = max(cosines, key=lambda definition: cosines[definition])
    if cosines[best] < 0.99:
        raise Unknown(
            f"no known definition explains the balance loss: its gradient has a cosine of {cosines[best]:.2f}"
        )
    for other, cosine in cosines.items():
        if (other.pooled, other.padded) != (best.pooled, best.padded) and cosine > cosines[best] - 1e-4:
            raise Unknown("two definitions explain the balance loss equally well on these tokens")
    return best, cosines
