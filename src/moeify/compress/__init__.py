"""Compress models: quantise the weights of linear layers and experts to int8 or int4."""

from moeify.compress.quantize import quantize_experts

__all__ = ["quantize_experts"]
