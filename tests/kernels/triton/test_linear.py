"""The grouped linear map by kernels against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.kernels import naive_grouped_linear
from moeify.kernels.triton import grouped_linear
from strategies import agree, seeds
from triton_problems import COUNTS, DEVICE

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def leaf(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


@pytest.mark.parametrize(("counts", "bias"), [*((counts, True) for counts in COUNTS), ("even", False)])
def test_tokens_are_gathered_for_the_weight_of_their_expert(counts, bias):
    counts = torch.tensor(COUNTS[counts], device=DEVICE)
    source = torch.randint(0, 9, (int(counts.sum()),), device=DEVICE)
    leaves = [leaf(9, 40), leaf(len(counts), 18, 40), *([leaf(len(counts), 18)] if bias else [])]
    x, weight, *b = leaves
    fast = grouped_linear(x, weight, counts, *b, source=source)
    agree(fast, leaves, naive_grouped_linear(x[source], weight, counts, *b), leaves, rtol=1e-4, atol=1e-4)


@settings(max_examples=6)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 40), seeds)
def test_rows_of_any_number_and_width(counts, width, width_out, seed):
    torch.manual_seed(seed)
    counts = torch.tensor(counts, device=DEVICE)
    leaves = [leaf(int(counts.sum()), width), leaf(len(counts), width_out, width)]
    agree(grouped_linear(*leaves, counts), leaves, naive_grouped_linear(*leaves, counts), leaves, rtol=1e-4, atol=1e-4)


def test_two_maps_of_low_rank_are_an_adapter():
    counts, source = torch.tensor([3, 5], device=DEVICE), torch.arange(8, device=DEVICE) % 4
    x, a, b = leaves = [leaf(4, 24), leaf(2, 3, 24), leaf(2, 20, 3)]
    slow = naive_grouped_linear(naive_grouped_linear(x[source], a, counts), b, counts)
    agree(
        grouped_linear(grouped_linear(x, a, counts, source=source), b, counts),
        leaves,
        slow,
        leaves,
        rtol=1e-4,
        atol=1e-4,
    )


def test_it_is_captured_whole_by_the_compiler():
    torch._dynamo.reset()
    counts = torch.tensor([3, 5], device=DEVICE)
    leaves = [leaf(8, 24), leaf(2, 20, 24), leaf(2, 20)]
    call = lambda x, weight, bias: grouped_linear(x, weight, counts, bias)  # noqa: E731
    agree(torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves), leaves, call(*leaves), leaves)
