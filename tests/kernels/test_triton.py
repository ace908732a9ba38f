"""The kernels without a GPU: computed by Triton's interpreter in a process of its own, and compiled to machine code."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moeify.kernels.stacked import SWIGLU, ClampedGlu, Plain
from nights import nightly

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter compiles nothing; unset TRITON_INTERPRET", allow_module_level=True)

ROOT = Path(__file__).parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GPUS = {  # capability, family in the table of sizes, matrix instruction, KB of shared memory
    "A100": (80, "ampere", "mma.sync", 100),
    "H100": (90, "hopper", "wgmma.mma_async", 228),
    "B200": (100, "hopper", "tcgen05.mma", 228),
    "RTX 5090": (120, "ampere", "mma.sync", 100),
}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
}  # fmt: skip
PRODUCTS = {"_product", "_activation_backward", "_product_tn"}
LAYERS = {"swiglu": (SWIGLU, False, False), "gpt-oss": (ClampedGlu(), True, True), "gelu": (Plain(F.gelu), True, False)}
ROUND, ODD = (2048, 768), (1000, 750)  # D and H


@pytest.mark.parametrize("marks", ["not nightly", nightly("nightly")])
def test_the_interpreter_computes_what_the_definitions_say(marks):
    pytest.importorskip("triton", minversion="3.9", reason="older interpreters do not know numpy 2.4")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "tests/kernels/triton", "-q", "-p", "no:cacheprovider", "-m", marks]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


@dataclass(frozen=True)
class Binary:
    """What a kernel was compiled to."""

    kernel: str
    instructions: str
    stack: int
    shared: int


def compiled(run: Callable[[], None], gpu: str, folder: Path) -> list[Binary]:
    """All kernels that are launched, compiled for a GPU."""
    capability, family, *_ = GPUS[gpu]
    return [binary(*launch, capability, folder) for launch in launches_of(run, family)]


def run_layer(activation, bias: bool, transposed: bool, dtype: torch.dtype, widths=ROUND, tokens: int = 4096) -> None:
    """A layer forwards and backwards on memory that is never touched."""
    from moeify.kernels.triton import layer
    from moeify.kernels.triton.activation import kernel_activation

    (width, hidden), k, num_experts, n = widths, 2, 8, kernel_activation(activation)

    def floats(*shape):
        return torch.empty(shape, dtype=dtype)

    def integers(size):
        return torch.empty(size, dtype=torch.int64)

    def weight(out, size):
        return floats(num_experts, size, out).transpose(1, 2) if transposed else floats(num_experts, out, size)

    rows, maps = tokens * k, activation.projections * hidden
    up, down = weight(maps, width), weight(width, hidden)
    biases = (floats(num_experts, maps), floats(num_experts, width)) if bias else (None, None)
    decision = torch.empty(rows), integers(rows), integers(num_experts), integers(rows), integers(tokens + 1)
    kind = n.act, n.gated, n.alpha, n.limit
    x, dy, before = floats(tokens, width), floats(tokens, width), floats(rows, maps)
    layer._forward._init_fn(x, up, biases[0], down, biases[1], *decision, *kind, True)
    wanted = [True, True, bias, True, bias, True]
    layer._backward._init_fn(dy, x, before, up, down, biases[1], *decision, *kind, wanted)


def launches_of(run: Callable[[], None], family: str) -> list[tuple[Any, tuple, dict]]:
    """What is launched: kernels, arguments and constants."""
    from moeify.kernels.triton import layer, linear
    from moeify.kernels.triton.config import table

    launches = []

    def config(kernel, x, rows, *widths):
        return table(family, kernel, x.dtype, rows, *widths)

    def keep(kernel, *arguments, grid, warmup, **constants):
        launches.append((kernel, arguments, constants))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", keep)
        patch.setattr(layer, "config", config)
        patch.setattr(linear, "config", config)
        run()
    return launches


def binary(kernel: Any, arguments: tuple, constants: dict, capability: int, folder: Path) -> Binary:
    """Compile a launch as Triton would for such arguments."""
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    signature, fixed, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[place] if place < len(arguments) else constants[parameter.name]
        is_pointer = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or value is None or (not is_pointer and value == 1):
            signature[parameter.name], fixed[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if is_pointer else type_of(value)
        if is_pointer or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, fixed, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=options)
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file], capture_output=True, text=True).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return Binary(kernel.__name__, made.asm["ptx"], stack, made.metadata.shared)


def type_of(number: float) -> str:
    if isinstance(number, float):
        return "fp32"
    return "i32" if number < 2**31 else "i64"


def fits(binaries: list[Binary], gpu: str, matrix: str) -> None:
    """Require that products run on matrix units, that no register is spilled, and that shared memory suffices."""
    assert not [b.kernel for b in binaries if b.kernel in PRODUCTS and matrix not in b.instructions]
    assert not [b.kernel for b in binaries if b.stack]
    assert not [b.kernel for b in binaries if b.shared > 1024 * GPUS[gpu][3]]


@pytest.mark.parametrize(
    ("layer", "gpu"),
    [
        ("swiglu", "H100"),
        ("gpt-oss", "H100"),
        nightly("gelu", "H100"),
        *(nightly(layer, "A100") for layer in LAYERS),
        nightly("swiglu", "B200"),
        nightly("swiglu", "RTX 5090"),
    ],
)
def test_products_run_on_matrix_units_and_nothing_is_spilled(layer, gpu, tmp_path):
    binaries = compiled(lambda: run_layer(*LAYERS[layer], torch.bfloat16), gpu, tmp_path)
    assert {b.kernel for b in binaries} >= PRODUCTS
    fits(binaries, gpu, GPUS[gpu][2])


@pytest.mark.parametrize("gpu", [nightly("A100"), "H100"])
@pytest.mark.parametrize(
    ("dtype", "widths"), [nightly(torch.float32, ROUND), (torch.float32, ODD), nightly(torch.bfloat16, ODD)]
)
def test_neither_fp32_nor_odd_widths_spill(dtype, widths, gpu, tmp_path):
    fits(compiled(lambda: run_layer(*LAYERS["swiglu"], dtype, widths), gpu, tmp_path), gpu, GPUS[gpu][2])


@pytest.mark.parametrize("gpu", [nightly("A100"), "H100"])
@pytest.mark.parametrize("tokens", [64, nightly(256)])
def test_few_rows_per_expert_have_lower_tiles(tokens, gpu, tmp_path):
    matrix = "mma.sync" if tokens == 64 else GPUS[gpu][2]  # 16 rows are too few for Hopper's own instruction
    binaries = compiled(lambda: run_layer(*LAYERS["swiglu"], torch.bfloat16, tokens=tokens), gpu, tmp_path)
    fits([b for b in binaries if b.kernel != "_product_tn"], gpu, matrix)


@pytest.mark.parametrize("gpu", [nightly("A100"), "H100"])
def test_adapters_of_low_rank_run_on_matrix_units(gpu, tmp_path):
    def adapter(width: int = 2048, rank: int = 16, rows: int = 4096, num_experts: int = 16) -> None:
        from moeify.kernels.triton.linear import _backward, _forward

        counts, source = (torch.empty(size, dtype=torch.int64) for size in (num_experts, rows))
        x, low, dy = (torch.empty(size, dtype=torch.bfloat16) for size in ((rows, width), (rows, rank), (rows, width)))
        down, up = (torch.empty(num_experts, *size, dtype=torch.bfloat16) for size in ((rank, width), (width, rank)))
        _forward._init_fn(x, down, None, counts, source)
        _forward._init_fn(low, up, None, counts, None)
        _backward._init_fn(dy, low, up, counts, None, [True, True, False])
        _backward._init_fn(low, x, down, counts, None, [True, True, False])

    fits(compiled(adapter, gpu, tmp_path), gpu, "mma.")  # sums of 16 rows are too few for Hopper's own instruction


@pytest.mark.parametrize("gpu", [nightly("A100"), "H100"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_decoder_keeps_all_in_registers(bits, gpu, tmp_path):
    fits(compiled(lambda: decode(bits), gpu, tmp_path), gpu, "")


def decode(bits: int, width: int = 1024, hidden: int = 768, num_experts: int = 8, group_size: int = 64) -> None:
    """Two tokens by two experts each, on memory that is never touched."""
    from moeify.kernels.triton.decode import _decode

    def map_of(out, size):
        stored = {16: (size, torch.bfloat16), 8: (size, torch.int8), 4: (size // 2, torch.uint8)}
        columns, dtype = stored[bits]
        scales = {16: None, 8: torch.empty(num_experts, out), 4: torch.empty(num_experts, out, size // group_size)}
        return torch.empty(num_experts, out, columns, dtype=dtype), None, scales[bits]

    index, gates = torch.empty(2, 2, dtype=torch.int64), torch.empty(2, 2)
    maps = *map_of(2 * hidden, width), *map_of(width, hidden)
    _decode._init_fn(torch.empty(2, width, dtype=torch.bfloat16), index, gates, *maps, hidden, "silu", True, 0.0, 0.0)
