"""Environment variables of moeify: each declared once, with its meaning, its default and the values it may have.

They are read when they are needed, so a change takes effect at once. An empty value counts as unset.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SWITCH = ("0", "1")


@dataclass(frozen=True)
class Variable:
    """One variable of the environment.

    Attributes:
        name: of the variable.
        meaning: what it does, in Markdown.
        default: the value where it is not set; in words if it is computed.
        allowed: all values that it may have, or none if it may be any of `sort`.
        sort: what a value is, where none is listed.
    """

    name: str
    meaning: str
    default: str
    allowed: tuple[str, ...] = _SWITCH
    sort: str = "a folder"

    @property
    def value(self) -> str:
        """The value in the environment, else the default.

        Raises:
            ValueError: a value that is not allowed.
        """
        value = os.environ.get(self.name) or self.default
        if self.allowed and value not in self.allowed:
            raise ValueError(f"{self.name}={value} is not a setting of moeify; choose one of {', '.join(self.allowed)}")
        return value

    @property
    def is_on(self) -> bool:
        """Whether a switch is set to 1."""
        return self.value == "1"

    @property
    def path(self) -> Path | None:
        """The path that it names, None where it is not set."""
        value = os.environ.get(self.name)
        return Path(value) if value else None

    @property
    def words(self) -> list[str]:
        """The words that it holds, none where it is not set."""
        return os.environ.get(self.name, "").split()


AUTOTUNE = Variable(
    "MOEIFY_AUTOTUNE",
    "measure the tile sizes of Triton kernels at the first layer of every shape, and keep the fastest in the cache",
    "0",
)
CACHE = Variable(
    "MOEIFY_CACHE",
    "the folder for all that is compiled or measured on this machine: C++ libraries, which kernel is faster for how "
    "many rows, tile sizes of Triton kernels, and the bases of claims",
    "`$XDG_CACHE_HOME/moeify`, or `~/.cache/moeify`",
    allowed=(),
)
CHECK = Variable("MOEIFY_CHECK", "compare the output of every backend with the definition, `compose`", "0")
CLAIM_RESULTS = Variable(
    "MOEIFY_CLAIM_RESULTS",
    "the folder to which claims append their rows; `moeify reproduce` sets it",
    "`claims/results`",
    allowed=(),
)
CPP = Variable(
    "MOEIFY_CPP",
    "the C++ kernels: `1` for the best instruction set of the processor, `0` for none, or an instruction set by name",
    "1",
    allowed=("0", "1", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "neon", "portable"),
)
CXXFLAGS = Variable(
    "MOEIFY_CXXFLAGS",
    "options for the compiler of the C++ kernels, after moeify's own, such as `-O1`; a wheel's are then not taken",
    "none",
    allowed=(),
    sort="options",
)
DATA = Variable(
    "MOEIFY_DATA",
    "the folder of the files that claims and benchmarks are measured on",
    "none",
    allowed=(),
)
FP32_GEMM = Variable(
    "MOEIFY_FP32_GEMM",
    "the library that multiplies matrices in fp32 on a CPU; `auto` takes the one that is measured to be faster",
    "auto",
    allowed=("auto", "blas", "onednn"),
)
PACK = Variable(
    "MOEIFY_PACK", "let inference on a CPU keep packed copies of expert weights, as `pack` does, in every model", "0"
)
TRACEBACK = Variable("MOEIFY_TRACEBACK", "show where an error of the command line came from", "0")
TRITON = Variable("MOEIFY_TRITON", "let `auto` take the Triton kernels, which no GPU has run yet", "0")

VARIABLES = (AUTOTUNE, CACHE, CHECK, CLAIM_RESULTS, CPP, CXXFLAGS, DATA, FP32_GEMM, PACK, TRACEBACK, TRITON)
"""Every variable that moeify reads; the guide's page on the environment lists the same."""


def cache_folder() -> Path:
    """Where compiled libraries and tuned sizes are kept: `MOEIFY_CACHE`, or a folder of the user's cache.

    For a user without a home directory, as in some containers, it is a folder among the temporary files.
    """
    if CACHE.path is not None:
        return CACHE.path
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "moeify"
    try:
        return Path.home() / ".cache" / "moeify"
    except RuntimeError:
        temporary = Path(tempfile.gettempdir())  # on Windows a folder of the user's own
        return temporary / (f"moeify-{os.getuid()}" if hasattr(os, "getuid") else "moeify")
