"""`import moeify` is cheap: it brings in neither a compiler nor another heavy library beside torch."""

import subprocess
import sys

import pytest
import torch

from moeify.kernels.constant import constant_result

HEAVY = ("accelerate", "safetensors", "sympy", "torch._dynamo", "torch._inductor", "transformers", "triton", "typer")


def modules_after(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_public_names_are_there_whatever_is_imported_first():
    program = (
        "import sys, types, moeify; assert 'torch' not in sys.modules; "
        "import moeify.record, moeify.sparsify.convert; from moeify import record, sparsify; "
        "assert callable(record) and callable(sparsify) and moeify.record is record; "
        "assert all(name in dir(moeify) and not isinstance(getattr(moeify, name), types.ModuleType) "
        "for name in moeify.__all__); moeify.losses.balance; assert not hasattr(moeify, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("first", ["moeify.sparsify", "moeify.cli.options"])
def test_every_named_recipe_is_made_whatever_is_imported_first(first):
    program = f"import {first}; from moeify.sparsify import recipes; print(len([recipes[name] for name in recipes]))"
    made = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert int(made) > 30


def test_importing_moeify_imports_nothing_heavy():
    assert not modules_after("import moeify") & set(HEAVY)


def test_a_layer_is_imported_runs_and_learns_without_a_compiler():
    imports = (
        "import sys, torch, moeify, moeify.backends, moeify.kernels, moeify.routers, moeify.losses; "
        "from moeify.experts import FFN; from moeify.routers import TopK; assert 'sympy' not in sys.modules"
    )
    loaded = modules_after(f"{imports}; moeify.MoE(TopK(8, 4), FFN(4, 8, 16))(torch.randn(3, 8)).sum().backward()")
    assert not loaded & {"torch._dynamo", "triton"}
    assert not [name for name in loaded if name.startswith("moeify.kernels.triton")]


def test_torch_takes_the_result_of_a_marked_function_as_a_constant():
    @constant_result
    def opaque() -> float:
        return float(len(open(__file__).name) > 0)

    def theirs() -> None:
        pass

    assert vars(opaque) == vars(torch.compiler.assume_constant_result(theirs))
    compiled = torch.compile(lambda x: x + opaque(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [1, 1]
