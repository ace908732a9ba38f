"""`moeify doctor`: what is installed, which kernels will run, and why."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import moeify
from moeify.backends import BACKENDS, choose
from moeify.context import Context
from moeify.experts import FFN
from moeify.kernels import explain
from moeify.routers import TopK

_EXTRAS = {
    "adapters": ("nevergrad", "peft", "sklearn"),
    "data": ("datasets", "pyarrow"),
    "gpu": ("triton",),
    "report": ("matplotlib",),
}


def doctor() -> None:
    """Say what is installed, which kernels will run on this machine, and why."""
    console = Console()
    facts = Table("what", "found", title="machine", title_justify="left")
    facts.add_row("moeify", moeify.__version__)
    facts.add_row("python", platform.python_version())
    for package in ("torch", "transformers", "accelerate", "safetensors"):
        facts.add_row(package, _version(package))
    facts.add_row(
        "processor", f"{platform.machine()}, {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"
    )
    facts.add_row("vector instructions", torch.backends.cpu.get_cpu_capability())
    facts.add_row("GPU", _gpu())
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        found = f"missing {', '.join(missing)}: pip install 'moeify[{extra}]'" if missing else "installed"
        facts.add_row(f"extra {extra}", escape(found))
    console.print(facts)
    kernels = Table("device", "dtype", "grouped_linear", "layer", "refused", title="kernels", title_justify="left")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            kernels.add_row(device, str(dtype).removeprefix("torch."), *_kernels(device, dtype))
    console.print(kernels)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _kernels(device: str, dtype: torch.dtype) -> tuple[str, str, str]:
    """What a layer of 8 experts would run: the kernel with its reason, the backend, and who refuses why."""
    router, experts = TopK(64, 8).to(device, dtype), FFN(8, 64, 128).to(device, dtype)
    x = torch.randn(16, 64, device=device, dtype=dtype)
    routing = router(x, Context())
    refused = [f"{name}: {reason}" for name, b in BACKENDS.items() if (reason := b.refuse(x, routing, experts))]
    return explain(x, experts.up[0]), choose(x, routing, experts), "; ".join(refused) or "none"
