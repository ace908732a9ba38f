"""C++ kernels for a CPU, compiled at first use: a fused sparse layer, grouped GEMMs, activations, a decoding step."""

from moeify.kernels.cpu.cpp.build import LEVELS, Unavailable, explain, levels, library, why_not
from moeify.kernels.cpu.cpp.call import cpp_layer

__all__ = ["LEVELS", "Unavailable", "cpp_layer", "explain", "levels", "library", "why_not"]
