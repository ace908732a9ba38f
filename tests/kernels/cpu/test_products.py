"""The C++ kernel's products of few rows against their definition, at every level of this processor."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.kernels.cpu import cpp, segments
from moeify.kernels.cpu.cpp.products import multiply_runs, multiply_runs_tn
from moeify.kernels.cpu.segments import blocks, multiply_rows, multiply_rows_tn
from strategies import seeds

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
counts = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any)
sizes = st.integers(1, 150)


@pytest.fixture
def kernel(level):
    if reason := cpp.why_not():
        pytest.skip(reason)


def stack(num_experts, height, width, dtype, transposed):
    if transposed:
        return torch.randn(num_experts, width, height).to(dtype).transpose(1, 2)
    return torch.randn(num_experts, height, width).to(dtype)


def near(found, exact, dtype):
    assert found.dtype == dtype
    scale = max(1.0, exact.abs().max().item())
    torch.testing.assert_close(found.double() / scale, exact / scale, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ROUNDING)
@settings(max_examples=20)
@given(counts, sizes, sizes, st.booleans(), seeds)
def test_products_of_few_rows_are_those_of_the_definition(threads, dtype, counts, height, width, transposed, seed):
    torch.manual_seed(seed)
    weight = stack(len(counts), height, width, dtype, transposed)
    rows, left = torch.randn(sum(counts), width).to(dtype), torch.randn(sum(counts), height).to(dtype)
    (block,) = blocks(counts)
    before, were = torch.get_num_threads(), torch.ones_like(weight)
    torch.set_num_threads(threads)
    try:
        out = multiply_runs(rows, weight, block)
        sums, total = torch.full_like(weight, torch.nan), were.clone()
        multiply_runs_tn(left, rows, sums, block, add=False)
        multiply_runs_tn(left, rows, total, block, add=True)
    finally:
        torch.set_num_threads(before)
    expert = torch.repeat_interleave(torch.tensor(counts))
    near(out, torch.einsum("rd,rod->ro", rows.double(), weight[expert].double()), dtype)
    products = torch.einsum("ro,rd->rod", left.double(), rows.double())
    exact = torch.zeros(weight.shape, dtype=torch.float64).index_add(0, expert, products)
    asked = torch.tensor(counts) > 0
    near(sums[asked], exact[asked], dtype)
    near(total[asked], exact[asked] + 1, dtype)
    assert sums[~asked].isnan().all()  # matrices of experts without rows are not touched
    assert torch.equal(total[~asked], were[~asked])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("count", [16, 96, 107, 202])
def test_products_of_many_rows_are_summed_a_part_of_a_row_at_a_time(count, dtype):
    rows, weight = torch.randn(count + 3, 531).to(dtype), torch.randn(2, 523, 531).to(dtype)
    out = multiply_runs(rows, weight, [(1, 0, count), (0, count, count + 3)])
    near(out[:count], rows[:count].double() @ weight[1].double().t(), dtype)
    near(out[count:], rows[count:].double() @ weight[0].double().t(), dtype)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_of_many_rows_are_written_a_strip_of_columns_at_a_time(dtype):
    left, right = torch.randn(700, 9).to(dtype), torch.randn(700, 1003).to(dtype)
    sums, total = torch.full((1, 9, 1003), torch.nan, dtype=dtype), torch.ones(1, 9, 1003, dtype=dtype)
    multiply_runs_tn(left, right, sums, [(0, 0, 700)], add=False)
    multiply_runs_tn(left, right, total, [(0, 0, 700)], add=True)
    exact = left.double().t() @ right.double()
    near(sums[0], exact, dtype)
    near(total[0], exact + 1, dtype)


@pytest.mark.usefixtures("kernel")
def test_rows_of_one_block_may_begin_anywhere():
    counts, weight = [2, 3, 1], torch.randn(3, 5, 7)
    rows = torch.randn(6, 7)
    whole = multiply_runs(rows, weight, next(blocks(counts)))
    parts = [multiply_runs(rows[block[0][1] : block[-1][2]], weight, block) for block in blocks(counts, 3)]
    assert len(parts) > 1
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("more", [False, True])
def test_the_kernel_is_taken_for_few_rows_of_large_stacks(more, monkeypatch):
    if reason := cpp.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(segments, "max_rows", lambda kind, dtype: 20)
    rows_each = 20 + more
    taken = []
    monkeypatch.setattr(segments, "multiply_runs", lambda *a: taken.append("map") or multiply_runs(*a))
    monkeypatch.setattr(segments, "multiply_runs_tn", lambda *a, **k: taken.append("tn") or multiply_runs_tn(*a, **k))
    weight = torch.randn(2, 384, 384)
    rows = torch.randn(2 * rows_each, 384)
    (block,) = blocks([rows_each] * 2)
    out, sums = multiply_rows(rows, weight, None, block), torch.empty_like(weight)
    multiply_rows_tn(out, rows, sums, block)
    assert taken == ([] if more else ["map", "tn"])
    near(
        out,
        torch.cat([r.double() @ w.T.double() for r, w in zip(rows.split(rows_each), weight, strict=True)]),
        out.dtype,
    )
    near(sums[1], out[rows_each:].T.double() @ rows[rows_each:].double(), out.dtype)


def test_without_a_kernel_few_rows_go_to_the_library(monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "0")
    monkeypatch.setattr(segments, "multiply_runs", lambda *a: pytest.fail("the kernel is switched off"))
    weight, rows = torch.randn(2, 384, 384), torch.randn(4, 384)
    out = multiply_rows(rows, weight, None, next(blocks([2, 2])))
    near(
        out, torch.cat([rows[:2].double() @ weight[0].T.double(), rows[2:].double() @ weight[1].T.double()]), out.dtype
    )


@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("counts", [[200], [0, 129, 1], [64, 700, 63]])
def test_many_rows_are_shared_between_library_and_kernel_and_products_are_those_of_the_definition(
    setting, dtype, counts, monkeypatch
):
    monkeypatch.setenv("MOEIFY_CPP", setting)
    monkeypatch.setenv("MOEIFY_FP32_GEMM", "onednn")
    monkeypatch.setattr(segments, "max_rows", lambda *a: 40)
    weight, rows = stack(len(counts), 384, 384, dtype, setting == "1"), torch.randn(sum(counts), 384).to(dtype)
    left, expert = torch.randn(sum(counts), 384).to(dtype), torch.repeat_interleave(torch.tensor(counts))
    (block,) = blocks(counts)
    exact = torch.cat([r.double() @ w.T.double() for r, w in zip(rows.split(counts), weight, strict=True)])
    near(multiply_rows(rows, weight, None, block), exact, dtype)
    products = [a.T.double() @ b.double() for a, b in zip(left.split(counts), rows.split(counts), strict=True)]
    for add in (False, True):
        sums = torch.ones_like(weight)
        multiply_rows_tn(left, rows, sums, block, add=add)
        for e in expert.unique().tolist():
            near(sums[e], products[e] + add, dtype)


@pytest.mark.parametrize("most", [0, 40])
def test_a_library_that_compiles_meets_few_numbers_of_rows(most, monkeypatch):
    monkeypatch.setattr(segments, "is_compiled", lambda *a, **k: True)
    met = set()
    for count in range(1, 4096):
        few, many = segments._by_kernel([(0, 7, 7 + count)], most, torch.empty(0))
        runs = sorted(few + many, key=lambda run: run[1])
        assert [runs[0][1], runs[-1][2]] == [7, 7 + count]
        assert all(before[2] == after[1] for before, after in pairwise(runs))
        assert all(last - first <= most for _, first, last in few)
        met |= {last - first for _, first, last in many}
    assert len(met) < 300  # and oneDNN keeps the kernels of 1024 shapes
