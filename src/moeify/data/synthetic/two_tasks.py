"""A synthetic table with two correlated tasks, numbers, categories and missing values, after MMoE, section 3."""

from __future__ import annotations

import math
from typing import Any

import torch

NUMBERS, CATEGORIES = 16, {"colour": 5, "shop": 12, "weekday": 7}


def two_tasks(count: int, seed: int, *, correlation: float = 0.5) -> list[dict[str, Any]]:
    """Rows with 16 columns of numbers, three of categories, and the tasks `clicked` and `bought`, 1 in about 30 %.

    Each task is whether a sum of a linear function of the columns, sines of it, and noise is large; the weights of the
    two linear functions have the given correlation. A twentieth of the inputs is missing.

    Args:
        count: rows.
        seed: of rows and noise; the functions are the same for every seed.
        correlation: of the tasks, from 0 to 1.
    """
    world, dice = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    width = NUMBERS + sum(CATEGORIES.values())
    u1, u2 = torch.linalg.qr(torch.randn(width, 2, generator=world)).Q.T
    weights = torch.stack([u1, correlation * u1 + math.sqrt(1 - correlation**2) * u2])
    frequency, phase = torch.randn(2, 5, 1, 1, generator=world)
    numbers = torch.randn(count, NUMBERS, generator=dice)
    chosen = {name: torch.randint(size, (count,), generator=dice) for name, size in CATEGORIES.items()}
    one_hot = [torch.nn.functional.one_hot(values, CATEGORIES[name]).float() for name, values in chosen.items()]
    linear = torch.cat([numbers, *one_hot], 1) @ weights.T
    score = linear + torch.sin(frequency * linear + phase).sum(0)
    score = score + 0.3 * torch.randn(count, 2, generator=dice)
    labels = (score > score.quantile(0.7, dim=0)).int().tolist()
    missing = torch.rand(count, NUMBERS + len(CATEGORIES), generator=dice) < 0.05
    columns = [f"x{i}" for i in range(NUMBERS)] + list(CATEGORIES)
    inputs = [
        [*values, *categories]
        for values, *categories in zip(numbers.tolist(), *(v.tolist() for v in chosen.values()), strict=True)
    ]
    return [
        {name: None if gone else (f"{name}-{value}" if name in CATEGORIES else value)
         for name, value, gone in zip(columns, row, lost, strict=True)}
        | {"clicked": clicked, "bought": bought}
        for row, lost, (clicked, bought) in zip(inputs, missing.tolist(), labels, strict=True)
    ]  # fmt: skip
