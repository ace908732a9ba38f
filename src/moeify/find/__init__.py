"""Find the feed-forward networks of a dense model, rebuild each as a `DenseFFN`, and verify it against the module."""

from moeify.find.dense import DenseFFN
from moeify.find.shapes import Site
from moeify.find.sub_tokens import sub_tokens
from moeify.find.where import chosen, every, ffn, last, last_half, linears, modules, named, odd

__all__ = [
    "DenseFFN", "Site", "chosen", "every", "ffn", "last", "last_half", "linears", "modules", "named", "odd",
    "sub_tokens",
]  # fmt: skip
