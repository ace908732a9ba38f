"""A model's output on one input before and after a change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.find.probe import Probe


@dataclass(frozen=True)
class Comparison:
    """A model's output on a probe before any change, to compare later outputs with."""

    probe: Probe
    before: Tensor

    @classmethod
    def of(cls, model: nn.Module, probe: Probe | None) -> Comparison | None:
        """Run a model as it is, if there is a probe."""
        return None if probe is None else cls(probe, probe.run(model))

    def difference(self, model: nn.Module) -> float:
        """The largest change of an output."""
        return (self.before - self.probe.run(model)).abs().max().item()

    def same(self, model: nn.Module) -> bool:
        """Whether the model still computes what it did, but for rounding."""
        rounding = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
        return self.difference(model) <= rounding * self.before.abs().max().item()
