"""Kernels: `grouped_linear`, which multiplies every run of rows by the weight of its own expert."""

from moeify.kernels.grouped import explain, grouped_linear
from moeify.kernels.naive import naive_grouped_linear

__all__ = ["explain", "grouped_linear", "naive_grouped_linear"]
