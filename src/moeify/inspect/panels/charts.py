"""Charts as plain data, which the page draws: heatmaps, lines, bars, points, coloured texts and images."""

from __future__ import annotations

import base64
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

UNKNOWN = 2**16 - 1
"""The 16-bit number that encodes an unknown value in a page."""


class Chart(ABC):
    """A chart."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values as the page reads them."""


@dataclass(frozen=True, kw_only=True)
class Heatmap(Chart):
    """A matrix whose values are colours.

    Attributes:
        values: of the cells, NaN for none.
        rows: a name for each row.
        columns: a name for each column; None for their numbers.
        row: what a row is.
        column: what a column is.
        unit: what a value is.
        scale: `ratio` has its centre at 1 and equal steps for equal factors; `signed` has it at 0; `plain` starts at 0.
        digits: decimals of a value in words.
        zero: what a value of 0 means, on the scale `ratio`.
        blank: what a value of NaN means.
    """

    values: Float[Tensor, "R C"]
    rows: Sequence[str]
    columns: Sequence[str] | None = None
    row: str = "layer"
    column: str = "expert"
    unit: str = ""
    scale: Literal["ratio", "signed", "plain"] = "plain"
    digits: int = 2
    zero: str = "no token"
    blank: str = "no such expert"

    def to_dict(self) -> dict[str, Any]:
        """The values in 65,535 steps between the lowest and the highest."""
        known = self.values[self.values.isfinite()].double()
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        return {
            "kind": "heatmap", "size": list(self.values.shape), "low": _rounded(low), "high": _rounded(high),
            "values": packed(self.values, low, high), "rows": list(self.rows),
            "columns": None if self.columns is None else list(self.columns), "row": self.row,
            "column": self.column, "unit": self.unit, "scale": self.scale, "digits": self.digits, "zero": self.zero,
            "blank": self.blank,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Curves over one axis.

    Attributes:
        x: the x coordinates, or names, which are evenly spaced.
        series: the values of each curve, NaN where there is none.
        x_label: what x is.
        y_label: what the values are, with their unit.
        band: a lower and an upper bound around a curve, by its name.
        from_zero: whether the vertical axis starts at 0.
    """

    x: Sequence[float] | Sequence[str]
    series: Mapping[str, Sequence[float]]
    x_label: str
    y_label: str
    band: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None
    from_zero: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Curves and bands with four digits."""
        bands = {name: [rounded(low), rounded(high)] for name, (low, high) in (self.band or {}).items()}
        return {
            "kind": "lines", "x": [x if isinstance(x, str) else _rounded(x) for x in self.x],
            "series": {name: rounded(values) for name, values in self.series.items()},
            "band": bands, "x_label": self.x_label, "y_label": self.y_label, "from_zero": self.from_zero,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bars(Chart):
    """Bars side by side, one group per name.

    Attributes:
        names: of the groups.
        series: the heights by series.
        x_label: what a group is.
        y_label: what a height is, with its unit.
        interval: a lower and an upper bound of the bars of a series.
    """

    names: Sequence[str]
    series: Mapping[str, Sequence[float]]
    x_label: str
    y_label: str
    interval: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Heights and bounds with four digits."""
        bounds = {name: [rounded(low), rounded(high)] for name, (low, high) in (self.interval or {}).items()}
        return {
            "kind": "bars", "x": list(self.names), "band": bounds,
            "series": {name: rounded(values) for name, values in self.series.items()},
            "x_label": self.x_label, "y_label": self.y_label,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Points(Chart):
    """Points with names, such as one per expert.

    Attributes:
        names: of the points.
        x: where they are, from left to right.
        y: how high they are.
        x_label: what x is.
        y_label: what y is, with its unit.
        interval: lower and upper bounds of y.
    """

    names: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    interval: tuple[Sequence[float], Sequence[float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Places and bounds with four digits."""
        return {
            "kind": "points", "names": list(self.names), "x": rounded(self.x), "y": rounded(self.y),
            "band": None if self.interval is None else [rounded(bound) for bound in self.interval],
            "x_label": self.x_label, "y_label": self.y_label,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ColouredText(Chart):
    """The tokens of a text, coloured by their first expert in a layer that the reader chooses.

    Attributes:
        tokens: as they are shown.
        layers: names.
        experts: of every layer and token, best first, -1 where there is none.
        weights: theirs, or None.
        num_experts: E of every layer.
    """

    tokens: Sequence[str]
    layers: Sequence[str]
    experts: Int[Tensor, "L T K"]
    weights: Float[Tensor, "L T K"] | None
    num_experts: Sequence[int]

    def to_dict(self) -> dict[str, Any]:
        """Experts as 16-bit numbers, weights in 65,535 steps over their range."""
        return {
            "kind": "text", "tokens": list(self.tokens), "layers": list(self.layers), "k": self.experts.shape[-1],
            "experts": indices(self.experts), "num_experts": list(self.num_experts),
            **_weights(self.weights),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ColouredImage(Chart):
    """The patches of an image, coloured by their first expert in a layer that the reader chooses.

    Attributes:
        pixels: the image in RGB.
        grid: rows and columns of patches.
        layers: names.
        experts: of every layer and patch, row by row, best first, -1 where there is none.
        weights: theirs, or None.
        num_experts: E of every layer.
    """

    pixels: UInt8[Tensor, "height width 3"]
    grid: tuple[int, int]
    layers: Sequence[str]
    experts: Int[Tensor, "L patches K"]
    weights: Float[Tensor, "L patches K"] | None
    num_experts: Sequence[int]

    def to_dict(self) -> dict[str, Any]:
        """Pixels as bytes, experts as 16-bit numbers, weights in 65,535 steps over their range."""
        return {
            "kind": "image", "size": list(self.pixels.shape[:2]), "pixels": _base64(self.pixels.contiguous()),
            "grid": list(self.grid), "layers": list(self.layers), "k": self.experts.shape[-1],
            "experts": indices(self.experts), "num_experts": list(self.num_experts),
            **_weights(self.weights),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Choice(Chart):
    """Several charts, of which the reader chooses one by name.

    Attributes:
        label: what is chosen.
        charts: by name.
        first: the name of the one that is shown before a choice; the first by default.
    """

    label: str
    charts: Mapping[str, Chart]
    first: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of them."""
        charts = {name: chart.to_dict() for name, chart in self.charts.items()}
        first = 0 if self.first is None else list(charts).index(self.first)
        return {"kind": "choice", "label": self.label, "charts": charts, "first": first}


@dataclass(frozen=True)
class Stack(Chart):
    """Charts one below the other.

    Attributes:
        charts: from top to bottom.
    """

    charts: Sequence[Chart]

    def to_dict(self) -> dict[str, Any]:
        """All of them."""
        return {"kind": "stack", "charts": [chart.to_dict() for chart in self.charts]}


def _weights(weights: Float[Tensor, "..."] | None) -> dict[str, Any]:
    if weights is None or bool(weights.isnan().all()):
        return {"weights": None}
    known = weights[weights.isfinite()]
    low, high = float(known.min()), float(known.max())
    return {"weights": packed(weights, low, high), "range": [low, high]}


def visible(text: str) -> str:
    """The text with control characters, bidirectional marks and lone surrogates escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def packed(values: Float[Tensor, "..."], low: float, high: float) -> str:
    """Values as 16-bit numbers in Base64: 0 is `low`, 65,534 is `high`, 65,535 is not known."""
    step = (high - low) / (UNKNOWN - 1) or 1.0
    numbers = ((values.double() - low) / step).round().clamp(0, UNKNOWN - 1)
    return _base64(numbers.nan_to_num(0).masked_fill(values.isnan(), UNKNOWN).to(torch.uint16))


def indices(values: Int[Tensor, "..."]) -> str:
    """Numbers below 65,535 as 16-bit numbers in Base64; -1 is not known."""
    return _base64(values.long().masked_fill(values < 0, UNKNOWN).to(torch.uint16))


def rounded(values: Sequence[float]) -> list[float | None]:
    """Values with four digits, None for what is not a number."""
    return [_rounded(value) for value in values]


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _base64(numbers: Tensor) -> str:
    return base64.b64encode(numbers.cpu().contiguous().numpy().tobytes()).decode()
