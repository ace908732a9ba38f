import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.kernels.cpu import cpp, onednn
from moeify.kernels.cpu.gradients import _MAPPED, gradient_of, new_stack
from moeify.kernels.cpu.onednn import can_pack, linear, multiply, packed, takes_onednn
from moeify.kernels.cpu.segments import blocks, multiply_rows, multiply_rows_tn
from strategies import seeds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

counts = st.lists(st.sampled_from([0, 0, 1, 2, 7, 16]), min_size=1, max_size=5)
widths = st.sampled_from([1, 3, 8, 16, 24, 33])


@pytest.fixture(params=["blas", "onednn"])
def library(request, monkeypatch):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", request.param)


def matrix(rows, columns, dtype=torch.float32, transposed=False):
    return torch.randn(columns, rows, dtype=dtype).t() if transposed else torch.randn(rows, columns, dtype=dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("left_transposed", [False, True])
@pytest.mark.parametrize("right_transposed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (16, 256, 64), (0, 4, 3), (4, 0, 3)])
def test_a_product_in_fp32_is_as_exact_as_fp32_allows(sizes, left_transposed, right_transposed):
    m, k, n = sizes
    left, right = matrix(m, k, transposed=left_transposed), matrix(k, n, transposed=right_transposed)
    out = torch.full((m, n), float("nan"))
    multiply(left, right, out)
    exact = left.double() @ right.double()
    bound = (left.double().abs() @ right.double().abs()) * torch.finfo(torch.float32).eps * max(1, k) ** 0.5
    assert ((out - exact).abs() <= bound + 1e-30).all()


def test_the_global_precision_of_products_is_neither_read_nor_set(monkeypatch):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", "onednn")
    before = torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled
    test_a_product_in_fp32_is_as_exact_as_fp32_allows((16, 256, 64), False, True)
    assert (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled) == before


def test_an_unknown_library_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", "mkl")
    with pytest.raises(ValueError, match=r"MOEIFY_FP32_GEMM=mkl .*auto, blas, onednn"):
        multiply(torch.ones(2, 2), torch.ones(2, 2), torch.empty(2, 2))


@pytest.mark.parametrize("faster", [False, True])
def test_the_faster_library_is_measured_once(monkeypatch, tmp_path, faster):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", "auto")
    cpp.why_not()  # compiles into the cache of all tests
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    rounds = []

    def stopwatch(*ways):
        rounds.append(ways)
        return [1.0, 0.5 if faster else 0.99]

    monkeypatch.setattr(onednn, "shortest", stopwatch)
    onednn.onednn_is_faster.cache_clear()
    assert [takes_onednn(4) for _ in range(3)] == [faster] * 3
    assert len(rounds) == 1
    onednn.onednn_is_faster.cache_clear()


def test_measuring_does_not_move_the_random_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", "auto")
    cpp.why_not()  # compiles into the cache of all tests
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    onednn.onednn_is_faster.cache_clear()
    before = torch.get_rng_state()
    takes_onednn(4)
    takes_onednn(1, left_transposed=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_where_results_must_repeat_nothing_is_decided_by_a_clock(monkeypatch):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", "auto")
    monkeypatch.setattr(onednn, "onednn_is_faster", lambda *_: True)
    assert not takes_onednn(4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights_are_the_same_weights(dtype, transposed):
    if not can_pack(dtype):
        assert dtype != torch.float32 or not onednn.available()
        return
    weight = torch.nn.Parameter(torch.randn(3, 5, 7, dtype=dtype))
    stack = weight.transpose(1, 2) if transposed else weight
    for rows in (1, 4, 33):
        x = torch.randn(rows, stack.shape[2], dtype=dtype)
        for made, given_ in zip(packed(stack, dtype), stack.detach(), strict=True):
            exact = x.double() @ given_.double().t()
            torch.testing.assert_close(linear(x, made).double(), exact, rtol=ROUNDING[dtype], atol=8 * ROUNDING[dtype])


@pytest.mark.usefixtures("library")
@given(counts, widths, widths, st.sampled_from(DTYPES), st.booleans(), seeds)
def test_every_row_meets_the_matrix_of_its_expert(sizes, width, width_out, dtype, transposed, seed):
    torch.manual_seed(seed)
    weight = torch.randn(len(sizes), width_out, width, dtype=dtype)
    if transposed:
        weight = torch.randn(len(sizes), width, width_out, dtype=dtype).transpose(1, 2)
    bias, rows = torch.randn(len(sizes), width_out, dtype=dtype), torch.randn(sum(sizes), width, dtype=dtype)
    expert = torch.repeat_interleave(torch.tensor(sizes))
    for block in blocks(sizes):
        exact = torch.einsum("rd,rod->ro", rows.double(), weight[expert].double()) + bias[expert].double()
        found = multiply_rows(rows, weight, bias, block)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype], atol=40 * ROUNDING[dtype])


@given(counts, st.integers(1, 9), st.booleans())
def test_blocks_hold_every_row_once_in_order(sizes, most, whole):
    runs = [run for block in blocks(sizes, most, whole=whole) for run in block]
    rows = [(expert, row) for expert, first, last in runs for row in range(first, last)]
    assert rows == list(zip(torch.repeat_interleave(torch.tensor(sizes)).tolist(), range(sum(sizes)), strict=True))
    for block in blocks(sizes, most, whole=whole):
        assert block[-1][2] - block[0][1] <= most or (whole and len(block) == 1)


@pytest.mark.usefixtures("library", "uninitialised_memory_is_nan")
@pytest.mark.parametrize("transposed", [False, True])
def test_outer_products_are_summed_over_the_rows_of_each_expert(transposed):
    sizes = [3, 0, 2]
    weight = torch.empty(3, 6, 4) if not transposed else torch.empty(3, 4, 6).transpose(1, 2)
    left, right = torch.randn(5, 6), torch.randn(5, 4)
    out = gradient_of(weight, sizes)
    assert out.stride() == weight.stride()
    for block in blocks(sizes):
        multiply_rows_tn(left, right, out, block)
    torch.testing.assert_close(out, torch.stack([left[:3].T @ right[:3], torch.zeros(6, 4), left[3:].T @ right[3:]]))


@pytest.mark.parametrize("sizes", [[1, 0, 2], [1, 1, 1]])
def test_large_gradients_are_zero_where_nobody_writes(sizes):
    rows = _MAPPED // 4 // 1024
    stack = new_stack((3, rows, 1024), sizes, torch.empty(0))
    assert stack.nbytes > _MAPPED
    untouched = [matrix for matrix, count in zip(stack, sizes, strict=True) if count == 0]
    assert not any(matrix.any() for matrix in untouched)
