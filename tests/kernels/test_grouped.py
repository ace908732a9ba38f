import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from moeify.kernels import grouped_linear, naive_grouped_linear
from strategies import agree, gradients, seeds

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")

COUNTS = {
    "even": [2, 2, 2],
    "empty experts": [0, 5, 0],
    "one token": [0, 0, 1],
    "all to one": [7, 0, 0],
    "odd": [1, 3, 5],
    "nobody": [0, 0, 0],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(counts, width=5, width_out=3, dtype=torch.float32, bias=True):
    """Rows, weight and bias as leaves, the same in fp64, and the counts."""
    rows = torch.randn(sum(counts), width, dtype=dtype)
    weight = torch.randn(len(counts), width_out, width, dtype=dtype)
    leaves = [rows, weight, torch.randn(len(counts), width_out, dtype=dtype)][: 2 + bias]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    return [leaf.requires_grad_() for leaf in leaves], exact, torch.tensor(counts)


def call(function, leaves, counts):
    rows, weight, *bias = leaves
    return function(rows, weight, counts, *bias)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", COUNTS)
def test_rows_meet_the_weight_of_their_expert(name, bias, dtype):
    leaves, exact, counts = problem(COUNTS[name], dtype=dtype, bias=bias)
    tolerance = TOLERANCE[dtype]
    y = call(grouped_linear, leaves, counts)
    assert y.dtype == dtype
    agree(y, leaves, call(naive_grouped_linear, exact, counts), exact, rtol=tolerance, atol=tolerance)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 17), st.integers(1, 17), seeds)
def test_any_counts_and_any_widths_agree_with_the_definition(counts, width, width_out, seed):
    torch.manual_seed(seed)
    leaves, exact, counts = problem(counts, width, width_out)
    agree(call(grouped_linear, leaves, counts), leaves, call(naive_grouped_linear, exact, counts), exact)


def test_strides_do_not_matter():
    rows = torch.randn(5, 6).t().requires_grad_()
    weight = torch.randn(2, 5, 3).transpose(1, 2).requires_grad_()
    counts = torch.tensor([4, 2])
    exact = [leaf.detach().double().requires_grad_() for leaf in (rows, weight)]
    agree(grouped_linear(rows, weight, counts), [rows, weight], naive_grouped_linear(*exact, counts), exact)


def test_an_expanded_gradient_of_stride_zero_is_read_rightly():
    leaves, exact, counts = problem([2, 0, 3])
    call(grouped_linear, leaves, counts).sum().backward()
    call(naive_grouped_linear, exact, counts).sum().backward()
    for leaf, e in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), e.grad)


def test_an_expert_without_rows_gets_a_gradient_of_zero():
    leaves, _, counts = problem([2, 0, 3])
    _, weight, bias = gradients(call(grouped_linear, leaves, counts), leaves)
    assert weight[1].count_nonzero() == bias[1].count_nonzero() == 0


def test_the_derivative_is_the_limit_of_differences():
    leaves, _, counts = problem([2, 0, 3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: call(grouped_linear, leaves, counts), leaves)


def test_the_derivative_has_a_derivative():
    leaves, _, counts = problem([2, 0, 3], dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda *leaves: call(grouped_linear, leaves, counts).square(), leaves)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_costs_no_gradient(frozen):
    leaves, _, counts = problem([2, 1], bias=False)
    leaves[frozen].requires_grad_(False)
    call(grouped_linear, leaves, counts).sum().backward()
    assert leaves[frozen].grad is None
    assert leaves[1 - frozen].grad is not None


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_parameters():
    leaves, exact, counts = problem([2, 0, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(grouped_linear, leaves, counts)
    assert y.dtype == torch.bfloat16
    agree(y, leaves, call(naive_grouped_linear, exact, counts), exact, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_captured_whole_by_the_compiler(backend, dtype):
    torch._dynamo.reset()
    leaves, exact, counts = problem([2, 0, 3], dtype=dtype)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend=backend)
    tolerance = TOLERANCE[dtype]
    y = call(compiled, leaves, counts)
    agree(y, leaves, call(naive_grouped_linear, exact, counts), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("operator", ["grouped_matmul", "grouped_matmul_tn"])
def test_the_operators_keep_the_promises_of_custom_operators(operator):
    counts = torch.tensor([2, 0, 3])
    rows = torch.randn(5, 4, requires_grad=True)
    other = torch.randn(3, 6, 4) if operator == "grouped_matmul" else torch.randn(5, 6)
    library.opcheck(getattr(torch.ops.moeify, operator), (rows, other, counts))
