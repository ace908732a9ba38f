"""What must hold of an architecture that was made sparse by copies: its outputs stay, and padding is not routed."""

from __future__ import annotations

import inspect
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from architectures.inputs import LENGTH, SHORT, Inputs, padded
from moeify import MoE

TOLERANCE = 1e-4
Outputs = dict[str, Tensor]


@torch.no_grad()
def outputs(model: PreTrainedModel, given: Inputs) -> Outputs:
    """The floating-point tensors that a model answers with, by name; the same random numbers every time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        answer = model(**given)
    if isinstance(answer, Tensor):
        return {"output": answer}
    named = answer.items() if hasattr(answer, "items") else ((str(i), part) for i, part in enumerate(answer))
    return {name: part for name, part in named if isinstance(part, Tensor) and part.is_floating_point()}


def routed(model: nn.Module, given: Inputs, *, half: bool = False) -> list[int]:
    """The tokens that the sparse layers of a model route in one call, layer by layer; `half` of them if asked."""
    counts: list[int] = []
    with ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, MoE):
                hook = part.router.register_forward_hook(lambda module, args, routing: counts.append(routing.counts))
                stack.callback(hook.remove)
        outputs(model, given)
    return [int(each.sum()) // (4 if half else 2) for each in counts]


def batches(model: PreTrainedModel, given: Inputs) -> dict[str, Inputs]:
    """The batch as it is and, if the model takes a mask for it, padded on either side."""
    accepted = inspect.signature(model.forward).parameters
    found = {"whole": given}
    for side in ("right", "left") if "input_ids" in given else ("right",):
        batch = padded(given, side)
        if batch.keys() <= accepted.keys() and any(given.get(name) is not value for name, value in batch.items()):
            found[side] = batch
    return found


def real(name: str, output: Tensor, short: Outputs, side: str) -> Tensor:
    """The entries of an output that are those of real tokens: of the second sequence as many as it has alone."""
    length = short[name].shape[1] if name in short and short[name].dim() > 2 else None
    if side == "left" and length is None:
        return output.new_zeros(0)  # what is pooled from the first position is pooled from padding
    if side == "whole" or length is None or output.shape[0] != 2 or output.shape[1] == length:
        return output.flatten()
    hidden = output.shape[1] - length
    if side == "left":
        second = output[1, hidden:]
    elif hidden == LENGTH - SHORT:  # whatever follows the text, patches say, is real
        second = torch.cat([output[1, :SHORT], output[1, LENGTH:]])
    else:
        second = output[1, :length]
    return torch.cat([output[0].flatten(), second.flatten()])


def changed(before: Outputs, after: Outputs, short: Outputs, side: str) -> dict[str, float]:
    """The outputs that are not what they were at real tokens, with the largest difference."""
    found = {}
    for name, old in before.items():
        if old.shape != after[name].shape:
            found[name] = float("inf")
            continue
        a, b = real(name, old, short, side), real(name, after[name], short, side)
        if not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * _scale(a), equal_nan=True):  # fmt: skip
            found[name] = (a - b).abs().max().item()
    return found


def _scale(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
