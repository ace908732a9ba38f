"""A model's outputs on one input before and after a change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.find.dense import compute_dtype
from moeify.find.padding import at_real_tokens, padding_seen
from moeify.find.probe import Probe
from moeify.layers import moe_layers


@dataclass(frozen=True)
class Comparison:
    """A model's outputs on a probe before any change, to compare later outputs with."""

    probe: Probe
    before: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, probe: Probe) -> Comparison:
        """Run a model as it is."""
        return cls(probe, probe.outputs(model))

    def difference(self, model: nn.Module) -> float:
        """The largest change of an output."""
        return max(self._changes(model), default=0.0)

    def same(self, model: nn.Module) -> bool:
        """Whether every output is unchanged up to rounding."""
        rounding = torch.finfo(compute_dtype(model, model)).eps ** 0.5
        allowed = [rounding * _largest(before[before.isfinite()]) for before in self.before]
        return all(change <= most for change, most in zip(self._changes(model), allowed, strict=True))

    def _changes(self, model: nn.Module) -> list[float]:
        """The largest change of each output at tokens that no sparse layer treats as padding."""
        with padding_seen(moe_layers(model).values()) as real:
            after = self.probe.outputs(model)
        if [one.shape for one in after] != [one.shape for one in self.before]:
            return [torch.inf] * len(self.before)
        pairs = zip(at_real_tokens(self.before, real), at_real_tokens(after, real), strict=True)
        return [_largest((a - b)[(a != b) & ~(a.isnan() & b.isnan())]) for a, b in pairs]


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
