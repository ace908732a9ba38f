"""Kernels of sparse layers; here `grouped_linear`, a grouped GEMM of rows sorted by expert with their experts' weights.

A row is one (token, expert) pair of a routing decision. Shapes: T tokens, R rows, E experts, K experts per token, D
input width, M output width of the up projection (2H with a gate, else H), H hidden units per expert, O output width.
"""

from moeify.kernels.grouped import explain, grouped_linear
from moeify.kernels.naive import naive_grouped_linear

__all__ = ["explain", "grouped_linear", "naive_grouped_linear"]
