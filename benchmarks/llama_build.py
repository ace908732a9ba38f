"""Which instructions llama.cpp was built with: more or fewer than ours would make it no peer."""

from __future__ import annotations

import re
from pathlib import Path

UP_TO_AVX2 = {"GGML_AVX2": "avx2", "GGML_FMA": "fma", "GGML_F16C": "f16c", "GGML_BMI2": "bmi2"}
BEYOND = {
    "GGML_AVX_VNNI": "avx_vnni", "GGML_AVX512": "avx512f", "GGML_AVX512_VBMI": "avx512vbmi",
    "GGML_AVX512_VNNI": "avx512_vnni", "GGML_AVX512_BF16": "avx512_bf16", "GGML_AMX_TILE": "amx_tile",
    "GGML_AMX_INT8": "amx_int8", "GGML_AMX_BF16": "amx_bf16",
}  # fmt: skip
"""Options of its build, and how Linux names the instructions that they switch on."""


def why_not(tools: Path, *, avx2: bool) -> str | None:
    """The reason why a build is no peer on this machine, None if it is one.

    Args:
        tools: the folder of llama-bench, inside the folder that llama.cpp was built in.
        avx2: whether what it is compared with uses no instructions beyond AVX2, and otherwise all of this processor.
    """
    cache = tools.resolve().parent / "CMakeCache.txt"
    if not cache.exists():
        return f"{cache} says which instructions llama.cpp was built with, and is not there; give bin of a build folder"
    options = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    words = f"{options.get('CMAKE_C_FLAGS', '')} {options.get('CMAKE_CXX_FLAGS', '')}".split()
    if chosen := [flag for flag in words if flag.startswith("-m")]:
        return f"{tools} was built with {' '.join(chosen)}, so its options do not say which instructions it has"
    here = flags()
    wanted = {name for name, flag in (UP_TO_AVX2 if avx2 else UP_TO_AVX2 | BEYOND).items() if flag in here}
    has = {name for name in (*UP_TO_AVX2, *BEYOND) if options.get(name) == "ON"}
    if options.get("GGML_NATIVE") == "ON":
        has = {name for name, flag in (UP_TO_AVX2 | BEYOND).items() if flag in here}
    if avx2 and (more := sorted(has & set(BEYOND))):
        return f"{tools} was built with {', '.join(more)}, which is beyond AVX2; build it with -DGGML_NATIVE=OFF"
    if missing := sorted(wanted - has):
        how = " ".join(f"-D{name}=ON" for name in missing) if avx2 else "-DGGML_NATIVE=ON"
        return f"{tools} was built without {', '.join(missing)}, which this processor has; build it with {how}"
    return None


def flags() -> set[str]:
    """The instructions that the processor has, as Linux names it; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
