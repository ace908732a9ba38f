"""Sparse training on many devices: what a step costs there, and which layout is fastest."""

from moeify.parallel.grouped import ExpertWork, GroupedCost

__all__ = ["ExpertWork", "GroupedCost"]
