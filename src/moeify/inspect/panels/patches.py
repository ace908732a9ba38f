"""Panel: images whose patches have the colour of their expert."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from moeify.inspect.panels.charts import Choice, ColouredImage
from moeify.inspect.panels.counting import labels
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace

_IMAGES, _PIXELS = 4, 128


def patches(trace: Trace, images: Sequence[Float[Tensor, "3 height width"]]) -> Panel:
    """The first images, each patch in the colour of its first expert; of Soft MoE the one with the largest weight.

    Args:
        trace: of the images, one sequence each.
        images: in the order of their sequences.

    Raises:
        NotMeasured: there are no images, or their tokens form no square of patches.
    """
    layers = [layer for layer in trace if layer.k or layer.scores is not None]
    if not len(images) or not layers:
        raise NotMeasured("no images were given")
    sequence = layers[0].tokens.sequence
    if sequence is None:
        raise NotMeasured("the trace does not have the image of each token")
    layers = [layer for layer in layers if layer.tokens is layers[0].tokens]
    charts, rows = {}, []
    for number, image in enumerate(images[:_IMAGES]):
        places = (sequence == number).nonzero().flatten()
        side = math.isqrt(len(places))
        first = len(places) - side * side  # class and register tokens come first
        if side < 2 or first > 8:
            raise NotMeasured(f"{len(places)} tokens of an image form no square of patches")
        experts, weights = zip(*(_first(layer, places[first:]) for layer in layers), strict=True)
        charts[f"{number + 1}"] = ColouredImage(
            pixels=_pixels(image), grid=(side, side), layers=list(labels(layers).values()),
            experts=torch.stack(experts).unsqueeze(-1), weights=torch.stack(weights).unsqueeze(-1),
            num_experts=[layer.num_experts for layer in layers],
        )  # fmt: skip
        rows += [
            (f"{number + 1}", name, len(e.unique()), f"{_neighbours(e.view(side, side)):.0%}")
            for name, e in zip(labels(layers).values(), experts, strict=True)
        ]
    alike = sum(float(row[3].rstrip("%")) for row in rows) / len(rows)
    return Panel(
        title="Image patches",
        question="Which expert serves which patch? Equal colours are the same first expert.",
        picture=Choice(label="image", charts=charts),
        table=Table(("image", "layer", "experts", "neighbours with the same expert"), rows),
        advice=Advice(
            level="fine", finding=f"{alike:.0f}% of neighbouring patches have the same expert, in the mean.",
            action="If background patches crowd out the object under a capacity, serve with batch priority: "
            "moeify.serve.serve_with(model, priority='score').",
            gain="V-MoE matched its dense baseline with as little as half of the compute of inference",
            source="arXiv 2106.05974, section 4",
        ),
    )  # fmt: skip


def _first(layer: LayerTrace, places: Tensor) -> tuple[Tensor, Tensor]:
    """The first expert of some tokens, and its weight."""
    if layer.k:
        weights = torch.full((len(places),), math.nan) if layer.weights is None else layer.weights[places, 0].float()
        return layer.experts[places, 0].long(), weights
    assert layer.scores is not None
    best = layer.scores[places].float().max(-1)
    return best.indices, best.values


def _neighbours(grid: Tensor) -> float:
    same = torch.cat([(grid[1:] == grid[:-1]).flatten(), (grid[:, 1:] == grid[:, :-1]).flatten()])
    return float(same.float().mean())


def _pixels(image: Float[Tensor, "3 height width"]) -> UInt8[Tensor, "height width 3"]:
    """The image between its darkest and brightest value, at most 128 pixels wide."""
    image = image.float().expand(3, -1, -1) if len(image) == 1 else image.float()[:3]
    scale = _PIXELS / max(image.shape[1:])
    if scale < 1:
        image = F.interpolate(image.unsqueeze(0), scale_factor=scale, mode="area")[0]
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(1e-9) * 255).round().to(torch.uint8).permute(1, 2, 0)
