"""Compress models: replace the weights of linear layers and experts by integers of 8 or 4 bits."""

from moeify.compress.quantize import quantize_experts

__all__ = ["quantize_experts"]
