"""Synthetic handwriting: the ten digits as strokes, each turned, stretched, shifted and drawn with another pen."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

Line = tuple[tuple[float, float], ...]


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Line:
    """Points of an ellipse around (x, y), by angles in degrees; 0 is right, 90 is down."""
    angles = [math.radians(start + (end - start) * i / 8) for i in range(9)]
    return tuple((x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles)


DIGITS: tuple[tuple[Line, ...], ...] = (
    (_arc(0, 0, 0.5, 0.8, 0, 360),),
    (((-0.25, -0.5), (0.05, -0.8), (0.05, 0.8)),),
    ((*_arc(0, -0.35, 0.45, 0.45, -180, 30), (-0.45, 0.8), (0.5, 0.8)),),
    (_arc(-0.05, -0.4, 0.45, 0.4, -150, 90), _arc(-0.05, 0.4, 0.5, 0.4, -90, 150)),
    (((0.2, 0.8), (0.2, -0.8), (-0.5, 0.3), (0.5, 0.3)),),
    (((0.45, -0.8), (-0.4, -0.8), (-0.4, -0.1)), _arc(-0.05, 0.3, 0.5, 0.5, -130, 140)),
    (((0.3, -0.8), (-0.3, -0.1)), _arc(0, 0.35, 0.45, 0.45, 0, 360)),
    (((-0.5, -0.8), (0.5, -0.8), (-0.1, 0.8)),),
    (_arc(0, -0.4, 0.38, 0.38, 0, 360), _arc(0, 0.4, 0.45, 0.42, 0, 360)),
    (_arc(0, -0.35, 0.42, 0.42, 0, 360), ((0.42, -0.35), (0.25, 0.8))),
)
"""The strokes of each digit, in coordinates from -1 to 1."""


def strokes(count: int, seed: int, *, size: int = 24) -> tuple[Float[Tensor, "count size size"], Int[Tensor, "count"]]:
    """Pictures of digits with values from 0 to 1, and which digit each is, all equally often.

    Args:
        count: how many.
        seed: of all that is random.
        size: pixels of a side.
    """
    dice = torch.Generator().manual_seed(seed)
    digits = torch.arange(count) % len(DIGITS)
    starts, ends = (segments[digits] for segments in _segments())  # (count, segments, 2)
    change = _changes(count, dice)
    shift = (torch.rand(count, 1, 2, generator=dice) - 0.5) * 0.4
    starts, ends = (points @ change + shift for points in (starts, ends))
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2)
    pen = 0.07 + 0.09 * torch.rand(count, 1, generator=dice)
    pictures = torch.stack(
        [torch.sigmoid((p - _distance(pixels, a, b)) * size / 2) for a, b, p in zip(starts, ends, pen, strict=True)]
    )
    noise = 0.15 * torch.randn(count, size * size, generator=dice)
    return (pictures + noise).clamp(0, 1).view(count, size, size), digits


def _segments() -> tuple[Float[Tensor, "10 S 2"], Float[Tensor, "10 S 2"]]:
    """Both ends of the segments of each digit; those with fewer repeat their last one."""
    pairs = [[pair for line in digit for pair in pairwise(line)] for digit in DIGITS]
    longest = max(map(len, pairs))
    filled = torch.tensor([several + several[-1:] * (longest - len(several)) for several in pairs])
    return filled[:, :, 0], filled[:, :, 1]


def _changes(count: int, dice: torch.Generator) -> Float[Tensor, "count 2 2"]:
    """Matrices that turn by up to 20 degrees, shear a little, and scale by 0.65 to 0.95 along either axis."""
    angle, shear = ((torch.rand(count, generator=dice) - 0.5) * 0.7 for _ in range(2))
    scale = 0.65 + 0.3 * torch.rand(count, 2, generator=dice)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(count, 2, 2)
    sheared = torch.eye(2).repeat(count, 1, 1)
    sheared[:, 1, 0] = shear
    return torch.diag_embed(scale) @ sheared @ turn


def _distance(
    pixels: Float[Tensor, "P 2"], starts: Float[Tensor, "S 2"], ends: Float[Tensor, "S 2"]
) -> Float[Tensor, "P"]:
    """Of each pixel to the nearest segment."""
    along = ends - starts
    to = pixels[:, None] - starts
    share = ((to * along).sum(-1) / (along * along).sum(-1).clamp_min(1e-9)).clamp(0, 1)
    return (to - share[..., None] * along).norm(dim=-1).amin(1)
