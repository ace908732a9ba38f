"""Checks that precede every timing of `benchmarks/gpu.py`: kernels agree with the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from gpu_cases import Case, Goal
from torch import Tensor
from torch.nn import functional as F

from moeify import backends
from moeify.backends import compose
from moeify.experts import LoRA
from moeify.experts.quantized import quantize
from moeify.kernels import naive_grouped_linear
from moeify.kernels.stacked import KNOWN, SWIGLU, ClampedGlu, Glu, Plain
from moeify.routing import assign


def errors(fast: Tensor, leaves: list[Tensor], slow: Tensor, exact: list[Tensor]) -> float:
    """The largest error of the output and of every gradient, relative to its size."""
    upstream = torch.randn_like(slow)
    found = [fast, *torch.autograd.grad(fast, leaves, upstream.to(fast.dtype))]
    right = [slow, *torch.autograd.grad(slow, exact, upstream)]
    return max(_error(a, b) for a, b in zip(found, right, strict=True))


def _error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right).norm() / right.norm().clamp_min(1e-30)).item()


def check(device: str, backend: str, decoder: str) -> list[str]:
    """What differs from the definition: every activation and dtype, widths that are round and odd."""
    wrong = []

    def note(what: str, error: float, tolerance: float) -> None:
        print(f"  {what:60s} {error:.2e}", "" if error <= tolerance else f"more than {tolerance:.0e}")
        if not error <= tolerance:
            wrong.append(what)

    activations = {name: Plain(act) for name, act in KNOWN.items()} | {"swiglu": SWIGLU, "geglu": Glu(F.gelu)}
    for dtype, tolerance in {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}.items():
        for name, activation in (activations | {"clamped": ClampedGlu()}).items():
            for tokens, width, hidden, experts, k in ((700, 256, 192, 8, 2), (300, 250, 99, 40, 3), (3, 64, 48, 8, 2)):
                goal = Goal(name, tokens, width, hidden, experts, k, activation, bias=name != "swiglu")
                case = Case(goal, device, dtype)
                for parameter in case.ffn.parameters():
                    torch.nn.init.normal_(parameter, std=width**-0.5)
                case.train()
                exact, x = deepcopy(case.ffn).double(), case.x.detach().double().requires_grad_()
                fast = backends.run(backend, case.x, case.route(), case.ffn)
                leaves = [case.x, case.gates, *case.ffn.parameters()]
                slow = compose(x, assign(case.index, case.gates.double(), experts), exact)
                error = errors(fast, leaves, slow, [x, case.gates, *exact.parameters()])
                note(f"layer {name} {goal.shape} {dtype}", error, tolerance)
                if tokens < 10:
                    with torch.no_grad():
                        decoded = backends.run(decoder, case.x, case.routing, case.ffn)
                    note(f"decode {name} {goal.shape} {dtype}", _error(decoded, slow), tolerance)
        for tokens, width, rank in ((700, 256, 16), (300, 250, 5)):
            error = check_adapters(device, backend, dtype, tokens, width, rank)
            note(f"low-rank experts T{tokens} D{width} r{rank} {dtype}", error, tolerance)
    for bits in (8, 4):
        case = Case(Goal("", 3, 256, 192, 8, 2), device, torch.float32)
        experts = quantize(case.ffn, bits)
        with torch.no_grad():
            right = compose(case.x, case.routing, experts).double()
            note(f"decode {bits} bits", _error(backends.run(decoder, case.x, case.routing, experts), right), 5e-5)
    return wrong


def check_adapters(device: str, backend: str, dtype: torch.dtype, tokens: int, width: int, rank: int) -> float:
    """The error of low-rank experts, gradients included."""
    lora = LoRA(8, width, rank=rank).to(device, dtype)
    torch.nn.init.normal_(lora.lora_B)
    exact = deepcopy(lora).double()
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    gates, index = torch.rand(tokens, 8, device=device).topk(2)
    x64, gates64 = (t.detach().double().requires_grad_() for t in (x, gates))
    fast = backends.run(backend, x, assign(index, gates.requires_grad_(), 8), lora)
    slow = compose(x64, assign(index, gates64, 8), exact)
    return errors(fast, [x, gates, *lora.parameters()], slow, [x64, gates64, *exact.parameters()])


def check_linear(device: str, linear: Callable[..., Tensor]) -> float:
    """The error of the grouped linear layer with gathered tokens, gradients included."""
    counts, source = torch.tensor([5, 0, 300], device=device), torch.randint(0, 64, (305,), device=device)
    shapes = ((64, 96), (3, 16, 96))
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    fast, slow = linear(*leaves, counts, source=source), naive_grouped_linear(exact[0][source], exact[1], counts)
    return errors(fast, leaves, slow, exact)


def check_promises(device: str) -> dict[str, bool]:
    """G10: what a layer promises beside being right."""
    case = Case(Goal("", 512, 256, 128, 16, 2), device, torch.bfloat16)
    case.train()
    leaves = [case.x, case.gates, *case.ffn.parameters()]

    def step() -> list[Tensor]:
        y = backends.run("triton", case.x, case.route(), case.ffn)
        return [y, *torch.autograd.grad(y, leaves, case.upstream)]

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second, waits = step(), False
    except RuntimeError:
        second, waits = first, True
    torch.cuda.set_sync_debug_mode("default")
    compiled = torch.compile(lambda x: backends.run("triton", x, case.route(), case.ffn), fullgraph=True)
    large = Goal("", 2**20 + 64, 2048, 64, 2, 1)  # more than 2^31 numbers in and out
    big = Case(large, device, torch.bfloat16)
    with torch.no_grad():
        y = backends.run("triton", big.x, big.routing, big.ffn)
        tail = compose(big.x[-64:], assign(big.index[-64:], big.gates[-64:], 2), big.ffn)
    nobody = backends.run("triton", case.x[:0], assign(case.index[:0], case.gates[:0], 16), case.ffn)
    return {
        "nothing waits for the device": not waits,
        "twice is the same to the last bit": all(map(torch.equal, first, second)),
        "captured whole by torch.compile": _error(compiled(case.x), first[0].double()) < 1e-2,
        "more than 2^31 numbers": _error(y[-64:], tail.double()) < 1e-2,
        "no tokens": nobody.shape == case.x[:0].shape,
    }
