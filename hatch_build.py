"""A build hook that compiles the C++ kernels into the wheel, for one platform; off, so that wheels are for any.

HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 python -m pip wheel --no-deps .
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPILER = "src/moeify/kernels/cpu/cpp/compiler.py"
LEVELS = {
    "x86_64": ("avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable"),
    "aarch64": ("neon", "portable"),
    "arm64": ("neon", "portable"),
}
"""The instruction sets that a wheel has kernels for, by machine."""


class PrebuiltKernels(BuildHookInterface):
    """Adds a library for every instruction set, and names the platform in the wheel's tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before hatchling collects the files."""
        if version == "editable":
            return
        compiler = _load(Path(self.root) / COMPILER)
        command = [*os.environ.get("CXX", "c++").split(), *compiler.FLAGS]
        self.folder = tempfile.TemporaryDirectory()
        for level in LEVELS[platform.machine()]:
            file = Path(self.folder.name) / f"{compiler.name(level)}.so"
            compiler.compile_([*command, *compiler.LEVELS[level]], file)
            build_data["force_include"][str(file)] = f"moeify/kernels/cpu/cpp/prebuilt/{file.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, *_: Any) -> None:
        """Remove what was compiled."""
        if hasattr(self, "folder"):
            self.folder.cleanup()


def _load(file: Path) -> ModuleType:
    """The module of a file of the package, which cannot be imported whole: the build has no torch."""
    spec = importlib.util.spec_from_file_location("compiler", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
