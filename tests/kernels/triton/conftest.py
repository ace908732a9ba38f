"""These tests run on a GPU, or in Triton's interpreter, which `tests/kernels/test_triton.py` starts by

TRITON_INTERPRET=1 python -m pytest tests/kernels/triton
"""

import importlib.util
import os

import torch

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (interpreted or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]
elif interpreted:
    from triton.runtime.interpreter import InterpretedFunction

    first_call, seen = InterpretedFunction.__call__, set()

    def call(self, *arguments, **named):
        """The interpreter looks for builtins to replace at every call inside a kernel, a third of the time of these
        tests; but the kernel has replaced its own, and those of another module stay replaced after the first call."""
        module = self.fn.__module__
        if module not in seen:
            seen.add(module)
            return first_call(self, *arguments, **named)
        return self.rewrite()(*arguments, **named)

    InterpretedFunction.__call__ = call
