"""Synthetic sounds to classify: three tones with overtones and noise, whose class is the order of their pitches."""

from __future__ import annotations

import math
from itertools import permutations

import torch

from moeify.data.audio import Sound

RATE, SECONDS = 16_000, 0.9
RATIOS = (1.0, 1.2, 1.44)
"""Of the frequencies of the three tones: a minor third each, as 6 to 5."""


def melodies(count: int, seed: int) -> list[tuple[Sound, str]]:
    """Sounds of 0.9 s at 16 kHz, each with its class: `low middle high` and the five other orders.

    The lowest pitch, from 200 to 800 Hz, the loudness of four overtones, the length of each tone and the noise are
    random, so that no single frequency tells a class.

    Args:
        count: how many.
        seed: of all that is random.
    """
    dice = torch.Generator().manual_seed(seed)
    names: tuple[str, ...] = ("low", "middle", "high")
    orders = list(permutations(range(3)))
    found: list[tuple[Sound, str]] = []
    for number in range(count):
        order = orders[number % len(orders)]
        lowest = 200 * 4 ** torch.rand((), generator=dice).item()
        lengths = 0.6 + 0.8 * torch.rand(3, generator=dice)
        lengths = (lengths / lengths.sum() * RATE * SECONDS).int().tolist()
        timbre = torch.rand(4, generator=dice) / torch.arange(1, 5)
        parts = [_tone(lowest * RATIOS[i], length, timbre) for i, length in zip(order, lengths, strict=True)]
        wave = torch.cat(parts)
        noise = 0.3 * torch.rand((), generator=dice) * wave.std() * torch.randn(len(wave), generator=dice)
        found.append((Sound((wave + noise) / 4, RATE), " ".join(names[i] for i in order)))
    return found


def _tone(frequency: float, length: int, timbre: torch.Tensor) -> torch.Tensor:
    """A tone that fades in and out over a tenth of it."""
    phase = 2 * math.pi * frequency * torch.arange(length) / RATE
    wave = torch.stack([amplitude * torch.sin(n * phase) for n, amplitude in enumerate(timbre, 1)]).sum(0)
    edge = torch.arange(length).minimum(torch.arange(length).flip(0)) / (length / 10)
    return wave * edge.clamp(max=1)
