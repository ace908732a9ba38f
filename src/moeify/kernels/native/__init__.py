"""One C++ function for a whole sparse layer on a CPU, compiled at first use; nothing else depends on it."""

from moeify.kernels.native.build import LEVELS, Unavailable, explain, levels, library, why_not
from moeify.kernels.native.call import native_layer

__all__ = ["LEVELS", "Unavailable", "explain", "levels", "library", "native_layer", "why_not"]
