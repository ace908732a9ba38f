"""What is installed on this machine, which kernels will run on it, and why: the tables of `moeify doctor`."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moeify.backends import backend_names, choose, find_backend
from moeify.cli import memory, threads
from moeify.context import Context
from moeify.experts import FFN
from moeify.kernels import explain
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp import reading
from moeify.kernels.cpu.crossover import ANY
from moeify.kernels.cpu.layer_crossover import max_layer_rows
from moeify.routers import TopK
from moeify.version import __version__

_EXTRAS = {
    "adapters": ("nevergrad", "peft", "sklearn"),
    "data": ("datasets", "pyarrow"),
    "gpu": ("triton",),
    "images": ("PIL",),
    "report": ("matplotlib",),
    "translation": ("sacrebleu",),
}


def describe_machine() -> None:
    """Print a table of versions and devices, and one of the kernels that will run."""
    console = Console()
    facts = Table("what", "found", title="machine", title_justify="left")
    facts.add_row("moeify", __version__)
    facts.add_row("python", platform.python_version())
    for package in ("torch", "transformers", "accelerate", "safetensors"):
        facts.add_row(package, _version(package))
    facts.add_row(
        "processor", f"{platform.machine()}, {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"
    )
    facts.add_row(*threads.describe().split(": ", 1))
    facts.add_row("freed memory", memory.describe())
    facts.add_row("vector instructions", torch.backends.cpu.get_cpu_capability())
    facts.add_row("C++ kernel", escape(cpp.explain()))
    facts.add_row("rows per expert for it", f"{_kernel_rows(torch.float32)}, {_kernel_rows(torch.bfloat16)}")
    facts.add_row("weights of one row", reading.explain())
    facts.add_row("GPU", _gpu())
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        found = f"missing {', '.join(missing)}: pip install 'moeify[{extra}]'" if missing else "installed"
        facts.add_row(f"extra {extra}", escape(found))
    console.print(facts)
    kernels = Table("device", "dtype", "grouped_linear", "training", "inference", title="kernels", title_justify="left")
    refusals = Table("device", "backend", "why it cannot be used", title="backends", title_justify="left")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16):
            layer = _Layer(device, dtype)
            with torch.no_grad():
                inference = layer.backend()
            products = explain(layer.x, layer.experts.up[0])
            kernels.add_row(device, str(dtype).removeprefix("torch."), products, layer.backend(), inference)
        for name, reason in layer.refusals():
            refusals.add_row(device, name, escape(reason))
    console.print(kernels)
    console.print(refusals)


def _kernel_rows(dtype: torch.dtype) -> str:
    most = max_layer_rows(dtype)
    return f"{str(dtype).removeprefix('torch.')} {'any number' if most == ANY else f'up to {most}'}"


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


class _Layer:
    """A layer of 8 experts, large enough for every backend, and a decision for its tokens."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.experts = FFN(8, 256, 512).to(device, dtype)
        self.x = torch.randn(16, 256, device=device, dtype=dtype)
        self.routing = TopK(256, 8).to(device, dtype)(self.x, Context())

    def backend(self) -> str:
        """The backend that `auto` selects."""
        return choose(self.x, self.routing, self.experts)

    def refusals(self) -> Iterator[tuple[str, str]]:
        """The backends that cannot run the layer in inference, with the reason."""
        with torch.no_grad():
            for name in backend_names():
                if reason := find_backend(name).refuse(self.x, self.routing, self.experts):
                    yield name, reason
