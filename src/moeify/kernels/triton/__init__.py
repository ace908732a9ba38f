"""Triton kernels for whole sparse layers; see `moeify.backends.triton` for what they serve.

Importing this package needs triton; nothing else of moeify imports it before a layer runs by it. Every kernel lies
beside the naive definition that it must agree with.
"""

from moeify.kernels.triton.adapters import sparse_adapters
from moeify.kernels.triton.layer import sparse_ffn
from moeify.kernels.triton.linear import grouped_linear

__all__ = ["grouped_linear", "sparse_adapters", "sparse_ffn"]
