"""Smaller models: weights of 8 and 4 bits in the places of a model's linear layers and experts."""

from moeify.compress.quantize import quantize_experts

__all__ = ["quantize_experts"]
