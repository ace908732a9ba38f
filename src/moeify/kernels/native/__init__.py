"""C++ for a CPU, compiled at first use: a whole sparse layer, products of few rows, and the steps of a decoder."""

from moeify.kernels.native.build import LEVELS, Unavailable, explain, levels, library, why_not
from moeify.kernels.native.call import native_layer

__all__ = ["LEVELS", "Unavailable", "explain", "levels", "library", "native_layer", "why_not"]
