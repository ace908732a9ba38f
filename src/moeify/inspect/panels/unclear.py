"""Advice that several panels share."""

from __future__ import annotations

from moeify.inspect.panels.panel import Advice


def too_little(finding: str, rows: float) -> Advice:
    """The advice where so few rows were seen that chance alone explains what a panel shows."""
    return Advice(
        level="unknown",
        finding=f"{finding} But there are only {rows:.1f} rows per expert, too few to distinguish from chance.",
        action="Record more tokens: 20 rows per expert at least, 100 for a difference of a tenth.",
        gain="a load known to ±22% with 20 rows, to ±10% with 100",
        source="1/√rows, the deviation of a Poisson count",
    )
