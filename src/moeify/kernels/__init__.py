"""Kernels: `grouped_linear`, a linear map with a weight of its own for every run of rows."""

from moeify.kernels.grouped import explain, grouped_linear
from moeify.kernels.naive import naive_grouped_linear

__all__ = ["explain", "grouped_linear", "naive_grouped_linear"]
