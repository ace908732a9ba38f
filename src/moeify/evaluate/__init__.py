"""Evaluate: what a sparse model costs and what it gains over its dense twin."""

from moeify.evaluate.flops import Count, count

__all__ = ["Count", "count"]
