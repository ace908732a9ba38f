"""The instruction sets of this processor, each with the options that tests compile its kernels with.

The fastest is compiled as users have it. The others are compiled with -O1, in a third of the time, and as users have
them by `make nightly`.
"""

from __future__ import annotations

from moeify.kernels.cpu import cpp

FASTEST, *OTHERS = cpp.levels()
COMPILED = [FASTEST, *(f"{level} -O1" for level in OTHERS)]
