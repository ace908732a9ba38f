"""What a model loses when a part is masked: its loss by sequence, sample or batch, or how far its outputs move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.find.causal import says_causal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How passes with and without a part are compared.

    Attributes:
        of: the values of a batch, (S,), from its inputs and the outputs of the model for it.
        name: of a value.
        unit: of a value.
        each: what has one value.
        chance: what guessing would give; None if unknown.
    """

    of: Callable[[int, Any], Float[Tensor, "S"]]
    name: str = "loss"
    unit: str
    each: str
    chance: float | None = None


@torch.no_grad()
def measure_for(model: nn.Module, batches: Sequence[Any], outputs: Sequence[Any]) -> Measure:
    """The loss of every sequence or sample if it is known, else that of every batch, else the change of the outputs.

    Args:
        model: the model.
        batches: its inputs.
        outputs: its outputs for each, with all parts.

    Raises:
        ValueError: the outputs have no numbers to compare.
    """
    for known in (_tokens, _classes, _own_loss):
        if (measure := known(model, batches, outputs)) is not None:
            return measure
    return _change(model, outputs)


def _tokens(model: nn.Module, batches: Sequence[Any], outputs: Sequence[Any]) -> Measure | None:
    """Mean negative log-likelihood of the ids of every sequence, aligned with the logits as the model's own loss is."""
    targets: list[Tensor] = []
    for batch, output in zip(batches, outputs, strict=True):
        ids, logits = _targets(batch), getattr(output, "logits", None)
        if ids is None or logits is None or logits.shape[:-1] != ids.shape:
            return None
        targets.append(ids)
    shift = int(_is_shifted(batches[0], outputs[0], says_causal(model)))
    if not shift and "labels" not in batches[0]:
        return None  # an encoder is not trained to predict its own inputs

    def of(number: int, output: Any) -> Float[Tensor, "S"]:
        return _likelihood(output.logits, targets[number], shift)

    return Measure(of=of, unit="nats per token", each="sequences", chance=math.log(outputs[0].logits.shape[-1]))


def _targets(batch: Any) -> Int[Tensor, "N T"] | None:
    """The ids that the model is to predict, -100 for padding."""
    if not isinstance(batch, Mapping):
        return None
    name = next((name for name in ("labels", "decoder_input_ids", "input_ids") if name in batch), None)
    if name is None or batch[name].dim() != 2 or batch[name].is_floating_point():
        return None
    mask = batch.get({"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.get(name, ""))
    return batch[name] if mask is None else batch[name].masked_fill(mask == 0, -100)


def _is_shifted(batch: Mapping[str, Any], output: Any, causal: bool) -> bool:
    """Whether logits are of the next id: with labels, as it comes closer to the model's own loss; else if causal."""
    own = getattr(output, "loss", None)
    if "labels" not in batch or own is None:
        return causal
    losses = (_likelihood(output.logits, batch["labels"], shift).mean() for shift in (0, 1))
    aligned, shifted = (float((loss - own).abs()) for loss in losses)
    return shifted < aligned


def _likelihood(logits: Float[Tensor, "N T V"], targets: Int[Tensor, "N T"], shift: int) -> Float[Tensor, "N"]:
    wanted = targets[:, shift:].to(logits.device)
    found = logits[:, : logits.shape[1] - shift].float().transpose(1, 2)
    loss = F.cross_entropy(found, wanted, reduction="none", ignore_index=-100)
    return loss.sum(1) / (wanted != -100).sum(1).clamp_min(1)


def _classes(model: nn.Module, batches: Sequence[Any], outputs: Sequence[Any]) -> Measure | None:
    """Cross-entropy of every sample, if its mean is the model's own loss."""
    for batch, output in zip(batches, outputs, strict=True):
        labels, logits = batch.get("labels") if isinstance(batch, Mapping) else None, getattr(output, "logits", None)
        own = getattr(output, "loss", None)
        if labels is None or logits is None or own is None or labels.is_floating_point():
            return None
        if labels.dim() != 1 or logits.dim() != 2 or len(labels) != len(logits):
            return None
        if not torch.isclose(F.cross_entropy(logits.float(), labels.to(logits.device)), own.float(), rtol=1e-3):
            return None

    def of(number: int, output: Any) -> Float[Tensor, "S"]:
        logits = output.logits.float()
        return F.cross_entropy(logits, batches[number]["labels"].to(logits.device), reduction="none")

    return Measure(of=of, unit="nats per sample", each="samples", chance=math.log(outputs[0].logits.shape[-1]))


def _own_loss(model: nn.Module, batches: Sequence[Any], outputs: Sequence[Any]) -> Measure | None:
    if any(getattr(output, "loss", None) is None for output in outputs):
        return None
    return Measure(of=lambda number, output: output.loss.float().reshape(1), unit="of the model's loss", each="batches")


def _change(model: nn.Module, outputs: Sequence[Any]) -> Measure:
    """‖y' - y‖ / ‖y‖ of every sample."""
    whole = [y for output in outputs if (y := _numbers(output)) is not None]
    if len(whole) < len(outputs):
        raise ValueError(f"{type(model).__name__} returns no tensor of numbers that could be compared")

    def of(number: int, output: Any) -> Float[Tensor, "S"]:
        y, other = whole[number].float().flatten(1), _numbers(output)
        assert other is not None
        return (other.float().flatten(1) - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-12)

    return Measure(of=of, name="change of the outputs", unit="of their norm", each="samples")


def _numbers(output: Any) -> Tensor | None:
    """The first tensor of real numbers with a dimension of samples."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() >= 2), None)
