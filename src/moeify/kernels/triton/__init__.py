"""Triton kernels for fused sparse layers; `moeify.backends.triton` lists the calls that they support.

Importing this package needs triton; moeify imports it when a layer first runs with it. Each kernel is defined next to
the reference implementation (`naive_...`) that it must agree with.
"""

from moeify.kernels.triton.adapters import sparse_adapters
from moeify.kernels.triton.layer import sparse_ffn
from moeify.kernels.triton.linear import grouped_linear

__all__ = ["grouped_linear", "sparse_adapters", "sparse_ffn"]
