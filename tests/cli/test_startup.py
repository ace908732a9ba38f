"""A command that computes nothing starts without torch."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "numpy", "safetensors", "accelerate", "jaxtyping"}


def modules_after(*arguments):
    program = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        f"sys.argv = ['moeify', *{arguments!r}]; from moeify.cli import main; main()"
    )
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.split())


@pytest.mark.parametrize(
    "arguments", ["--help", "train --help", "compare --help", "doctor --help", "trace --help", "recipes"]
)
def test_help_and_lists_import_nothing_heavy(arguments):
    loaded = modules_after(*arguments.split())
    assert "moeify.cli" in loaded
    assert not loaded & HEAVY
    assert len(loaded) < 600
