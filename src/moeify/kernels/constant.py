"""Mark functions whose result is constant to `torch.compile`, without importing the compiler.

`torch.compiler.assume_constant_result` sets the same mark, but imports `torch._dynamo` at once, and with it triton and
sympy: more than a second, for programs that may never compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """Mark a function whose result `torch.compile` may take as a constant; returns the same function."""
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function
