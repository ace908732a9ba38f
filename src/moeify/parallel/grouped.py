"""How long one device takes for its experts, from the rows that each of them gets.

The weights of an expert are read once, whatever its rows, which are computed in tiles of 16 to 64, the last of which
may be nearly empty. So few rows cost their experts' weights, and many cost their products:

    seconds = launch + experts + ((weights + rows)^p + (tiles + products)^p)^(1/p) + passing

This is a roofline (Williams et al., CACM 52(4), 2009) with a smooth corner, as reading and computing overlap in part;
its constants are fitted to measured layers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Float, Num
from torch import Tensor

SMALLEST_TILE, LARGEST_TILE = 16, 64
"""Rows of a tile, which kernels choose by the mean rows of an expert."""

COLUMNS = 64
"""Columns of a tile."""

ALIGNED = 16
"""Hidden units that a slice of an expert should be a multiple of; else its weights are read in shorter vectors."""


@dataclass(frozen=True, kw_only=True)
class ExpertWork:
    """What one device has to do for the experts of one layer, one element per case.

    Attributes:
        flops: of the products, padded to whole tiles.
        weights: bytes of the experts that have a row.
        moved: bytes of the rows that are read and written between the products.
        passed: bytes of the rows that pass the layer, whether or not their expert is here.
        tiles: number of tiles.
        experts: number of experts of the layer, on all devices.
        width: D.
        halvings: how often the reading of weights is halved, as slices of experts are no multiple of 16 hidden units.
    """

    flops: Float[Tensor, "..."]
    weights: Float[Tensor, "..."]
    moved: Float[Tensor, "..."]
    passed: Float[Tensor, "..."]
    tiles: Float[Tensor, "..."]
    experts: Float[Tensor, "..."]
    width: Float[Tensor, "..."]
    halvings: Float[Tensor, "..."]

    @classmethod
    def of(
        cls, counts: Num[Tensor, "... E"], *, width: float, hidden: float, matrices: int = 3, experts: int = 0,
        passing: Num[Tensor, "..."] | float | None = None,
    ) -> ExpertWork:  # fmt: skip
        """The work of experts of one size, in 16 bits.

        Args:
            counts: rows of each expert of this device.
            width: D.
            hidden: H, the hidden width of an expert, or of the slice of it that is here.
            matrices: 3 for gated experts, 2 for plain ones.
            experts: experts of the layer on all devices; 0 for those in `counts`.
            passing: rows that pass the layer; those of `counts` where rows were dispatched to their devices before.
        """
        counts = counts.double()
        rows, active = counts.sum(-1), (counts > 0).double().sum(-1)
        tile = (2 ** (rows / active.clamp_min(1)).clamp_min(1).log2().ceil()).clamp(SMALLEST_TILE, LARGEST_TILE)
        stacks = (counts / tile[..., None] - 1e-9).ceil().sum(-1)
        across = -(-(matrices - 1) * hidden // COLUMNS) + -(-width // COLUMNS)
        passing = rows if passing is None else torch.as_tensor(passing).double().expand_as(rows)
        size = matrices * width * hidden
        one = torch.ones_like(rows)
        return cls(
            flops=stacks * tile * 2 * size,
            weights=active * 2 * size,
            moved=rows * 2 * (2 * width + matrices * hidden),
            passed=passing * 2 * (width + matrices * hidden),
            tiles=stacks * across,
            experts=one * (experts or counts.shape[-1]),
            width=one * width,
            halvings=one * math.log2(ALIGNED / math.gcd(ALIGNED, int(hidden))),
        )

    @classmethod
    def cat(cls, parts: list[ExpertWork]) -> ExpertWork:
        """Several cases in one."""
        return cls(**{f.name: torch.cat([getattr(part, f.name).reshape(-1) for part in parts]) for f in fields(cls)})

    def __getitem__(self, kept: Tensor) -> ExpertWork:
        return ExpertWork(**{name: values[kept] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class GroupedCost:
    """Seconds of a forward pass through experts on a device of given FLOP/s and bytes/s.

    The values are those of an NVIDIA H100 in bf16, fitted by `claims/h100_layers.py`; shares are of the peak of the
    device, so that other devices are a change of two numbers.

    Attributes:
        launch: seconds of an empty layer.
        per_expert: seconds of each expert of the layer, whether or not it is here.
        products: share of the FLOP/s that large tiles reach.
        narrow: how much slower products are per 1,000 / D.
        memory: share of the bandwidth at which weights are read.
        moving: how often rows are moved between the products, in units of one read.
        passing: the same for rows that pass the layer.
        tile: seconds of a tile besides its products.
        unaligned: how much slower an expert is per halving.
        power: p, from 1, where reading and computing follow each other, upwards, where they overlap.
    """

    launch: float = 3.44e-5
    per_expert: float = 1.7e-8
    products: float = 0.76
    narrow: float = 0.103
    memory: float = 0.873
    moving: float = 0.328
    passing: float = 2.86
    tile: float = 5.1e-9
    unaligned: float = 0.70
    power: float = 2.4

    def seconds(self, work: ExpertWork, flops: float, bandwidth: float) -> Float[Tensor, "..."]:
        """The time of the work on a device of this many FLOP/s and bytes/s."""
        return _seconds({name: torch.tensor(value) for name, value in asdict(self).items()}, work, flops, bandwidth)

    @classmethod
    def fit(
        cls, work: ExpertWork, seconds: Float[Tensor, "N"], flops: float, bandwidth: float, steps: int = 300
    ) -> GroupedCost:
        """The cost that fits measured times, with the smallest Huber loss of their logarithms."""
        start = asdict(cls())
        guess = torch.tensor(list(start.values()), dtype=torch.float64)
        shift = torch.zeros_like(guess, requires_grad=True)  # logarithms of factors, so that all stay positive
        search = torch.optim.LBFGS([shift], max_iter=steps, line_search_fn="strong_wolfe", history_size=20)

        def loss() -> Tensor:
            search.zero_grad()
            values = dict(zip(start, guess * shift.exp(), strict=True))
            error = (_seconds(values, work, flops, bandwidth) / seconds).log()
            total = (
                torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=0.1) + 1e-5 * shift.square().sum()
            )
            total.backward()
            return total

        search.step(loss)
        return cls(**dict(zip(start, (guess * shift.detach().exp()).tolist(), strict=True)))


def _seconds(c: dict[str, Tensor], work: ExpertWork, flops: float, bandwidth: float) -> Float[Tensor, "..."]:
    rate = bandwidth * c["memory"]
    slower = (1 + c["unaligned"]) ** work.halvings
    memory = work.weights / rate * slower + work.moved / bandwidth * c["moving"]
    products = work.flops / (flops * c["products"]) * (1 + c["narrow"] * 1000 / work.width)
    products = (products + work.tiles * c["tile"]) * slower
    p = c["power"]
    overlapped = (memory.clamp_min(1e-12) ** p + products.clamp_min(1e-12) ** p) ** (1 / p)
    return c["launch"] + c["per_expert"] * work.experts + overlapped + work.passed / bandwidth * c["passing"]
