"""Synthetic pictures with captions: one coloured shape of some size somewhere, "a small red ring at the top left"."""

from __future__ import annotations

import random
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

COLOURS = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9), "yellow": (0.9, 0.8, 0.1),
    "purple": (0.6, 0.1, 0.7), "black": (0.05, 0.05, 0.05), "orange": (1.0, 0.5, 0.0), "grey": (0.5, 0.5, 0.5),
}  # fmt: skip
SIZES = {"small": 0.14, "large": 0.24}
ROWS = {"top": 0.28, "middle": 0.5, "bottom": 0.72}
SIDES = {"left": 0.28, "centre": 0.5, "right": 0.72}
SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "bar", "diamond")


def shapes(count: int, seed: int, *, size: int = 32) -> list[tuple[Float[Tensor, "3 size size"], str]]:
    """Pictures with values from 0 to 1 and their captions, all of which differ.

    A picture is shifted, scaled and tinted at random, a little; there are 1,152 captions.

    Args:
        count: how many, up to 1,152.
        seed: of all that is random.
        size: pixels of a side.
    """
    dice = random.Random(seed)
    chosen = dice.sample(list(product(SIZES, COLOURS, SHAPES, ROWS, SIDES)), count)
    found = []
    for large, colour, shape, row, side in chosen:
        y, x = ROWS[row] + dice.uniform(-0.05, 0.05), SIDES[side] + dice.uniform(-0.05, 0.05)
        where = drawn(shape, x, y, SIZES[large] * dice.uniform(0.85, 1.15), size)
        tint = torch.tensor(COLOURS[colour]) + torch.tensor([dice.uniform(-0.08, 0.08) for _ in range(3)])
        paper = dice.uniform(0.85, 1.0)
        picture = torch.where(where, tint.clamp(0, 1).view(3, 1, 1), torch.tensor(paper))
        found.append((picture, f"a {large} {colour} {shape} at the {row} {side}"))
    return found


def drawn(shape: str, x: float, y: float, radius: float, size: int) -> Bool[Tensor, "size size"]:
    """The pixels of a shape with its centre at (x, y), all as parts of a side."""
    ticks = (torch.arange(size) + 0.5) / size
    v, u = torch.meshgrid((ticks - y) / radius, (ticks - x) / radius, indexing="ij")
    far, wide = (u**2 + v**2).sqrt(), torch.maximum(u.abs(), v.abs())
    return {
        "disc": far < 1,
        "ring": (far < 1) & (far > 0.6),
        "square": wide < 0.9,
        "frame": (wide < 0.9) & (wide > 0.5),
        "triangle": (v < 0.8) & (v > 2 * u.abs() - 1),
        "cross": (wide < 1) & (torch.minimum(u.abs(), v.abs()) < 0.3),
        "bar": (u.abs() < 1) & (v.abs() < 0.4),
        "diamond": u.abs() + v.abs() < 1,
    }[shape]
