"""Mark functions whose result `torch.compile` treats as constant, without importing the compiler.

`torch.compiler.assume_constant_result` sets the same attribute, but imports `torch._dynamo`, triton and sympy, which
takes more than a second also in programs that never compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """Mark a function whose result `torch.compile` may treat as a constant; returns the same function."""
    function._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
    return function
