"""Run the C++ kernels on random problems, under the sanitizers of the compiler, and compare them with the definition.

    python tests/nightly/kernels.py --cases 2000

Shapes, dtypes, strides and alignments are drawn, experts without rows and calls without tokens among them. Every
instruction set of the processor takes its turn, and weights of a single row are read in every way. Where g++ brings
AddressSanitizer and UndefinedBehaviorSanitizer, what reads or writes outside of a tensor, or overflows, ends the run.
Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from unittest.mock import patch

import torch
from torch import Tensor

from moeify import assign
from moeify.backends import compose, find_backend
from moeify.experts import FFN, ClampedGlu, Glu, Plain, quantize
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp import call, products, steps
from moeify.kernels.cpu.cpp.between import activate, differentiate
from moeify.kernels.cpu.cpp.reading import READINGS
from moeify.kernels.stacked import KNOWN

SANITIZED = "MOEIFY_TEST_SANITIZED"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
DTYPES = (torch.float32, torch.bfloat16)


def misaligned(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same values at an address of odd elements, in memory of exactly this size."""
    offset = draw.randrange(4)
    memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    return memory[offset:].view(tensor.shape).copy_(tensor)


def strided(draw: random.Random, rows: Tensor) -> Tensor:
    """The same rows, with others' columns between them."""
    memory = torch.full((len(rows), rows.shape[1] + draw.randrange(3)), float("nan"), dtype=rows.dtype)
    return memory[:, : rows.shape[1]].copy_(rows)


def close(y: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(y.float() / scale, expected.float() / scale, rtol=0, atol=tolerance)


def layer(draw: random.Random) -> str:
    """A whole layer, its weights in 16 or 32, 8 or 4 bits."""
    dtype, bits = draw.choice(DTYPES), draw.choice([16, 16, 8, 4])
    num_experts, most = draw.randint(1, 9), draw.choice([150, 150, 600])  # a span of int8 numbers has 256 at most
    width, hidden = draw.randint(1, most), draw.randint(1, most)
    tokens, k = draw.choice([0, 1, 2, draw.randint(3, 60)]), draw.randint(1, num_experts)
    act = draw.choice(list(KNOWN.values()))
    activation = draw.choice([ClampedGlu(), Glu(act), Plain(act)])
    out = width + draw.randrange(5)
    experts = FFN(num_experts, width, hidden, activation=activation, bias=draw.random() < 0.5, width_out=out).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 1.0)
        parameter.data = misaligned(draw, parameter.data)
    if bits < 16:
        experts = quantize(experts, bits, group_size=draw.choice([32, 64]))
    used = draw.randint(k, num_experts)  # the others have no rows
    index = torch.stack([torch.randperm(used)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()
    routing = assign(index, torch.rand(tokens, k), num_experts)
    x = strided(draw, torch.randn(tokens, width).to(dtype))
    backend = find_backend("cpp")
    if (reason := backend.refuse(x, routing, experts)) is not None:
        return f"refused: {reason}"
    tolerance = 5e-6 if dtype == DTYPES[0] else 4e-2  # activations in bf16 may be rounded to 8 bits
    close(backend.run(x, routing, experts), compose(x, routing, experts), tolerance)
    return f"layer {bits}"


def product(draw: random.Random) -> str:
    """Products of rows sorted by expert, of both layouts, and their sums of outer products."""
    dtype = draw.choice(DTYPES)
    num_experts, out, width = draw.randint(1, 6), draw.randint(1, 90), draw.randint(1, draw.choice([90, 90, 600]))
    counts = [draw.choice([0, draw.randint(0, draw.choice([20, 20, 130]))]) for _ in range(num_experts)]
    counts[draw.randrange(num_experts)] += 1
    ends = torch.tensor(counts).cumsum(0).tolist()
    runs = [(e, end - count, end) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count]
    transposed = draw.random() < 0.5
    weight = torch.randn(num_experts, *((width, out) if transposed else (out, width))).to(dtype)
    weight = misaligned(draw, weight).transpose(1, 2) if transposed else misaligned(draw, weight)
    rows = misaligned(draw, torch.randn(ends[-1], width).to(dtype))
    parts = [rows[a:b].double() @ weight[e].double().T for e, a, b in runs]
    close(products.multiply_runs(rows, weight, runs), torch.cat(parts), 5e-6 if dtype == DTYPES[0] else 2e-2)
    left, add = misaligned(draw, torch.randn(ends[-1], out).to(dtype)), draw.random() < 0.5
    into = misaligned(draw, torch.randn(num_experts, *weight.shape[1:][:: -1 if transposed else 1]).to(dtype))
    into = into.transpose(1, 2) if transposed else into
    expected = into.double().clone()
    for e, a, b in runs:
        expected[e] = left[a:b].double().T @ rows[a:b].double() + (expected[e] if add else 0)
    products.multiply_runs_tn(left, rows, into, runs, add=add)
    close(into, expected, 5e-6 if dtype == DTYPES[0] else 2e-2)
    return "product"


def between(draw: random.Random) -> str:
    """The activation between two projections, and its gradient."""
    dtype, rows, hidden = draw.choice(DTYPES), draw.randint(0, 9), draw.randint(1, 90)
    name, gating = draw.choice(list(KNOWN)), draw.choice(["plain", "glu"])
    compute = (Glu if gating == "glu" else Plain)(KNOWN[name])
    before = misaligned(draw, torch.randn(rows, compute.projections * hidden).to(dtype))
    gradient = misaligned(draw, torch.randn(rows, hidden).to(dtype))
    scale, inputs = torch.rand(rows), before.double().requires_grad_()
    with torch.enable_grad():
        units = compute(inputs)
        (units * gradient.double() * scale.double().unsqueeze(1)).sum().backward()
    tolerance = 5e-6 if dtype == DTYPES[0] else 2e-2
    close(activate(before, gating, name), units, tolerance)
    by_inputs, by_scale = differentiate(before, gradient, scale, gating, name)
    close(by_inputs, inputs.grad, tolerance)
    close(by_scale, (units * gradient).sum(1), tolerance)
    return "activation"


def decoder_steps(draw: random.Random) -> str:
    """A norm, a linear layer and a gated activation, as a decoder's step runs them."""
    dtype, tokens = draw.choice(DTYPES), draw.randint(1, 5)
    head, heads, out = draw.randint(1, 70), draw.randint(1, 3), draw.randint(1, 90)
    x = misaligned(draw, torch.randn(tokens, head * heads))
    gain = misaligned(draw, torch.randn(head))
    weight = misaligned(draw, torch.randn(1, out, head * heads).to(dtype) / (head * heads) ** 0.5)
    bias = misaligned(draw, torch.randn(1, out).to(dtype)) if draw.random() < 0.5 else None
    normed, y, gated = torch.empty_like(x), misaligned(draw, torch.zeros(tokens, out)), torch.empty(tokens, out)
    act = draw.choice(list(KNOWN))
    steps.run_steps(
        [
            steps.norm(x, normed, gain, 1e-6),
            steps.linear(normed, y, weight, bias=bias, dtype=dtype),
            steps.gated_activation(y, y, gated, act),
        ],
        tokens,
    )
    parts = x.view(tokens, heads, head)
    expected = (parts * (parts.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain).view(tokens, -1)
    close(normed, expected, 5e-6)
    product = normed.to(dtype).double() @ weight[0].double().T + (0 if bias is None else bias.double())
    close(y, product, 5e-6 if dtype == DTYPES[0] else 2e-2)
    close(gated, KNOWN[act](y) * y, 5e-5)
    return "steps"


def fuzz(cases: int, seed: int, levels: list[str]) -> dict:
    seen: Counter[str] = Counter()
    torch.set_num_threads(1)
    for number in range(seed, seed + cases):
        draw = random.Random(number)
        torch.manual_seed(number)
        os.environ["MOEIFY_CPP"] = level = levels[number % len(levels)]
        print(f"\rcase {number} ", end="", file=sys.stderr, flush=True)
        way = draw.choice(READINGS)
        with torch.no_grad(), patch.object(call, "reading", lambda *_, way=way: way):
            kind = draw.choices([layer, product, between, decoder_steps], [6, 3, 1, 1])[0]
            try:
                seen[f"{level} {kind(draw)}"] += 1
            except AssertionError as error:
                raise SystemExit(
                    f"\ncase {number} on {level}: {error}\nagain: --cases 1 --seed {number} --levels {level}"
                ) from error
    return dict(sorted(seen.items()))


def sanitizers() -> dict[str, str] | None:
    """The environment in which Python runs kernels that g++ compiles with its sanitizers, None without them."""
    if shutil.which("g++") is None or sys.platform != "linux":
        return None
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        return None
    return {  # with the sanitizers, -O3 compiles for many minutes
        SANITIZED: "1", "CXX": "g++", "MOEIFY_CXXFLAGS": f"-O1 {FLAGS}", "LD_PRELOAD": library, "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--levels", nargs="+", default=cpp.levels(), help="instruction sets; all that run here")
    options.add_argument("--plain", action="store_true", help="without the sanitizers")
    chosen = options.parse_args()
    extra = None if chosen.plain or SANITIZED in os.environ else sanitizers()
    if extra is not None:
        sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **extra}).returncode)
    if reason := cpp.why_not():
        raise SystemExit(f"there is no kernel here: {reason}")
    began, seen = time.monotonic(), fuzz(chosen.cases, chosen.seed, chosen.levels)
    facts = {"cases": chosen.cases, "seed": chosen.seed, "sanitized": SANITIZED in os.environ}
    facts |= {"seconds": round(time.monotonic() - began), "seen": seen, "torch": torch.__version__}
    print("\n" + json.dumps(facts))


if __name__ == "__main__":
    main()
