"""Every kernel against the naive definition beside it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from moeify.kernels.triton.activation import kernel_activation
from moeify.kernels.triton.activation_backward import activation_backward, naive_activation_backward, weights
from moeify.kernels.triton.combine import combine, naive_combine
from moeify.kernels.triton.config import Config
from moeify.kernels.triton.product import naive_product, product
from moeify.kernels.triton.product_tn import column_sums, naive_column_sums, naive_product_tn, product_tn
from moeify.kernels.triton.tiles import naive_tile_table, tile_table
from strategies import seeds
from triton_problems import ACTIVATIONS, COUNTS, DEVICE, TOLERANCE

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
SIZE = Config(16, 32, 16, 4, 2)
WIDTHS = {"whole blocks": (32, 64), "odd": (17, 13)}


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def case(name):
    """Counts, and a token for each of their rows."""
    counts = torch.tensor(COUNTS[name], device=DEVICE)
    return counts, torch.randint(0, 9, (sum(COUNTS[name]),), device=DEVICE)


def close(found, right, dtype=torch.float32):
    assert_close(found.float(), right.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=70), st.sampled_from([1, 16, 128]))
def test_every_row_lies_in_one_tile_of_its_expert(counts, block):
    counts = torch.tensor(counts, device=DEVICE)
    rows = int(counts.sum())
    assert_close(tile_table(counts, rows, block).cpu(), naive_tile_table(counts, rows, block))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_goes_into_the_activation_and_what_comes_out(activation):
    counts, source = case("two tiles and a bit")
    activation = ACTIVATIONS[activation]
    x, weight, bias = randn(9, 17), randn(2, activation.projections * 13, 17), randn(2, activation.projections * 13)
    table = tile_table(counts, len(source), SIZE.m)
    found = product(x, source, weight, bias, table, len(source), SIZE, kernel_activation(activation), keep=True)
    for a, b in zip(found, naive_product(x, source, weight, bias, counts, activation), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("counts", "widths", "dtype"),
    [*((counts, "odd", torch.float32) for counts in COUNTS), *(("even", "whole blocks", dtype) for dtype in TOLERANCE)],
)
def test_rows_times_the_weight_of_their_expert(counts, widths, dtype):
    (depth, width), (counts, source) = WIDTHS[widths], case(counts)
    x, weight = randn(len(source), depth, dtype=dtype), randn(len(counts), width, depth, dtype=dtype)
    out, kept = product(x, None, weight, None, tile_table(counts, len(source), SIZE.m), len(source), SIZE)
    assert kept is None
    close(out, naive_product(x, None, weight, None, counts)[0], dtype)


def test_weights_may_lie_in_any_order():
    counts, source = case("even")
    x, weight = randn(9, 24), randn(3, 24, 20).transpose(1, 2)
    out, _ = product(x, source, weight, None, tile_table(counts, len(source), SIZE.m), len(source), SIZE)
    close(out, naive_product(x, source, weight, None, counts)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gradient_inside_an_expert(activation, bias):
    counts, source = case("two tiles and a bit")
    activation, width, rows = ACTIVATIONS[activation], 37, len(source)
    dy, weight, down = randn(9, 18), torch.rand(rows, device=DEVICE), randn(2, 18, width)
    before, down_bias = randn(rows, activation.projections * width), randn(2, 18) if bias else None
    table = tile_table(counts, rows, SIZE.m)
    gradient, weighted, parts = activation_backward(
        dy, source, weight, down, before, table, SIZE, kernel_activation(activation)
    )
    by_weight = weights(parts, dy, source, down_bias, table, SIZE.m)
    right = naive_activation_backward(dy, source, weight, down, down_bias, before, counts, activation)
    for a, b in zip((gradient, weighted, by_weight), right, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("counts", "widths", "gathered"),
    [*((counts, "odd", "left") for counts in COUNTS), ("even", "whole blocks", "right"), ("even", "odd", "neither")],
)
def test_sums_of_outer_products(counts, widths, gathered):
    (width, width_out), (counts, source) = WIDTHS[widths], case(counts)
    rows = len(source)
    left, right = (randn(9 if gathered == side else rows, w) for side, w in (("left", width_out), ("right", width)))
    of_left, of_right = (source if gathered == side else None for side in ("left", "right"))
    like = randn(len(counts), width_out, width)
    found = product_tn(left, of_left, right, of_right, counts, like, SIZE)
    a, b = (x if s is None else x[s] for x, s in ((left, of_left), (right, of_right)))
    close(found, naive_product_tn(a, b, counts))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_sums_of_columns(counts, weighted):
    counts, source = case(counts)
    rows, weight = randn(9, 13), torch.rand(len(source), device=DEVICE) if weighted else None
    close(column_sums(rows, source, weight, counts), naive_column_sums(rows[source], weight, counts))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 40), st.booleans(), seeds)
def test_every_token_adds_up_its_rows(pairs, width, weighted, seed):
    torch.manual_seed(seed)
    begin = torch.tensor([0, *pairs], device=DEVICE).cumsum(0)
    count = sum(pairs)
    order = torch.where(torch.rand(count) < 0.2, -1, torch.randperm(count)).to(DEVICE)
    rows, weight = randn(count, width), torch.rand(count, device=DEVICE) if weighted else None
    close(combine(rows, weight, order, begin), naive_combine(rows, weight, order, begin))
