"""Kernels: `grouped_linear`, a grouped GEMM: rows sorted by expert times the weight of their expert."""

from moeify.kernels.grouped import explain, grouped_linear
from moeify.kernels.naive import naive_grouped_linear

__all__ = ["explain", "grouped_linear", "naive_grouped_linear"]
