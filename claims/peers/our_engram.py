"""Our memory of n-grams on the inputs that `peers/engram_authors.py` gets too."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify import Context
from moeify.engram import Engram

Values = dict[str, Tensor]

VOCABULARY, ROWS, NGRAMS, DIMENSIONS, HEADS, KERNEL = 1000, 101, 3, 16, 4, 4


def memory() -> Engram:
    return Engram(
        8, rows=ROWS, dimensions=DIMENSIONS, ngrams=NGRAMS, heads=HEADS, kernel=KERNEL, vocabulary=VOCABULARY
    )  # fmt: skip


def engram_inputs() -> Values:
    """Ids, what the layer reads, sizes and weights of a memory."""
    torch.manual_seed(2)
    own, (batch, length) = memory(), (3, 40)
    weights = {name: torch.randn(value.shape) for name, value in own.named_parameters()}
    weights = {name.removesuffix(".weight"): value for name, value in weights.items()}
    weights["conv"] = weights["conv"].t().unsqueeze(1).contiguous()  # as torch's convolutions hold it
    return weights | {
        "ids": torch.randint(VOCABULARY, (batch, length)), "x": torch.randn(batch, length, 8),
        "direction": torch.randn(batch, length, 8), "multipliers": own.multipliers,
        "sizes": torch.tensor([VOCABULARY, ROWS, NGRAMS, DIMENSIONS, HEADS, KERNEL]),
    }  # fmt: skip


def against_engram(given: Values) -> Values:
    """Our answers under the names of `peers/engram_authors.py`."""
    own, context = memory(), Context()
    own.multipliers.copy_(given["multipliers"])
    leaves = {name.removesuffix(".weight"): parameter for name, parameter in own.named_parameters()}
    with torch.no_grad():
        for name, parameter in leaves.items():
            parameter.copy_(given[name].squeeze(1).t() if name == "conv" else given[name])
    context.call.inputs["input_ids"] = given["ids"]
    x = given["x"].clone().requires_grad_()
    y = own(x, context)
    (y * given["direction"]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in leaves.items()} | {"x": x.grad}
    gradients["conv"] = gradients["conv"].t().unsqueeze(1)
    places = own.places(given["ids"], torch.zeros_like(given["ids"]))
    return {"engram/places": places, "engram/y": y} | {f"engram/grad {k}": g for k, g in gradients.items()}
