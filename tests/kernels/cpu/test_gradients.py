"""Gradients of experts: memory of freed gradients is reused, and sums are accumulated in place."""

import ctypes
import gc
import mmap
import sys

import pytest
import torch

from moeify import assign, backends
from moeify.experts import FFN
from moeify.kernels.cpu import gradients
from moeify.kernels.cpu.gradients import accumulate_in_place, free_gradients, gradient_of, place_for


@pytest.fixture
def large(monkeypatch):
    """Every gradient counts as large."""
    monkeypatch.setattr(gradients, "_LARGE", 0)


def step(experts, seed=0, hit=3, loss=torch.sum):
    """A backward pass over seven tokens, of which the first `hit` experts get rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 8, generator=generator)
    index = torch.randint(hit, (7, 1), generator=generator)
    loss(backends.run("onednn", x, assign(index, torch.ones(7, 1), experts.num_experts), experts)).backward()


def experts_of(bias=True):
    torch.manual_seed(0)
    return FFN(4, 8, 6, bias=bias)


@pytest.mark.usefixtures("large")
def test_a_freed_gradient_leaves_its_memory_to_the_next():
    experts = experts_of()
    step(experts)
    place = experts.gate_up_proj.grad.data_ptr()
    experts.zero_grad(set_to_none=True)
    step(experts)
    assert experts.gate_up_proj.grad.data_ptr() == place


@pytest.mark.usefixtures("large")
def test_memory_that_is_used_again_is_zero_where_nobody_writes():
    experts, twin = experts_of(), experts_of()
    step(experts, seed=1, hit=4)
    experts.zero_grad(set_to_none=True)
    step(experts, seed=2, hit=2)
    step(twin, seed=2, hit=2)
    for found, expected in zip(experts.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
    assert not experts.down_proj.grad[2:].any()


@pytest.fixture
def small_pages(monkeypatch):
    """Memory is given back by pages of 4 KiB, as if these were huge."""
    monkeypatch.setattr(gradients, "_HUGE", mmap.PAGESIZE)


def in_memory(tensor):
    """Of every page of a tensor, whether it is mapped."""
    pages = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), pages) == 0
    return [bool(page & 1) for page in pages]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory that is given back need not be zero")
@pytest.mark.usefixtures("large", "small_pages")
def test_memory_that_is_used_again_is_not_mapped_where_nobody_writes(monkeypatch):
    monkeypatch.delattr(gradients.mmap, "MADV_HUGEPAGE")
    weight = torch.randn(4, 3, mmap.PAGESIZE // 4)
    gradient_of(weight, [1, 1, 1, 1]).fill_(7)
    again = gradient_of(weight, [0, 1, 0, 0])
    assert [any(in_memory(matrix)) for matrix in again] == [False, True, False, False]
    assert [matrix.unique().tolist() for matrix in again] == [[0], [7], [0], [0]]


@pytest.mark.usefixtures("large", "small_pages")
@pytest.mark.parametrize("size", [(1, mmap.PAGESIZE // 8), (5, mmap.PAGESIZE // 4 - 3), (3, mmap.PAGESIZE // 2 + 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 2, 0, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
def test_memory_that_is_given_back_in_part_is_zero_as_a_whole(size, dtype, counts):
    weight = torch.randn(5, *size).to(dtype)
    gradient_of(weight, [1] * 5).fill_(7)
    again = gradient_of(weight, counts)
    assert [matrix.unique().tolist() for matrix in again] == [[7 if count else 0] for count in counts]


@pytest.mark.usefixtures("large", "small_pages")
def test_memory_that_the_system_does_not_take_back_is_overwritten(monkeypatch):
    monkeypatch.setattr(gradients.mmap, "MADV_DONTNEED", 9999, raising=False)
    weight = torch.randn(2, 2, mmap.PAGESIZE)
    gradient_of(weight, [1, 1]).fill_(7)
    assert not gradient_of(weight, [0, 1])[0].any()


@pytest.mark.usefixtures("large")
def test_a_gradient_that_is_still_held_keeps_its_memory():
    weight = torch.randn(3, 4, 5)
    held = gradient_of(weight, [1, 1, 1]).fill_(7)
    part = held[1]
    other = gradient_of(weight, [1, 1, 1]).fill_(8)
    assert (held == 7).all()
    del held
    assert gradient_of(weight, [1, 1, 1]).data_ptr() not in (part.data_ptr() - 80, other.data_ptr())
    assert (part == 7).all()


@pytest.mark.usefixtures("large")
def test_memory_goes_with_its_weight_or_when_it_is_asked_to():
    experts = experts_of()
    step(experts)
    experts.zero_grad(set_to_none=True)
    shelf = gradients._SHELVES[experts.down_proj]
    assert len(shelf.free) == 1
    free_gradients(experts)
    assert experts.down_proj not in gradients._SHELVES
    before = len(gradients._SHELVES)
    step(experts)
    assert len(gradients._SHELVES) == before + 2
    del experts
    gc.collect()
    assert len(gradients._SHELVES) == before


@pytest.mark.usefixtures("large")
def test_a_system_that_refuses_huge_pages_does_no_harm(monkeypatch):
    monkeypatch.setattr(gradients.mmap, "MADV_HUGEPAGE", 9999, raising=False)
    experts = experts_of()
    step(experts)
    assert experts.down_proj.grad.any()


@pytest.mark.usefixtures("large")
def test_a_weight_that_has_become_larger_does_not_get_the_old_memory():
    weight = torch.nn.Parameter(torch.randn(2, 3, 4))
    gradient_of(weight, [1, 1])
    weight.data = torch.randn(2, 3, 4, dtype=torch.float64)
    assert gradient_of(weight, [1, 1]).nbytes == weight.nbytes
    assert len(gradients._SHELVES[weight].free) == 1


@pytest.mark.parametrize("bias", [False, True])
def test_sums_in_place_are_those_of_autograd(bias):
    experts, twin = accumulate_in_place(experts_of(bias)), experts_of(bias)
    for seed, hit in enumerate([4, 2, 3]):
        step(experts, seed, hit)
        step(twin, seed, hit)
        if seed == 0:
            places = [p.grad.data_ptr() for p in experts.parameters()]
    for found, expected in zip(experts.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert [p.grad.data_ptr() for p in experts.parameters()] == places


def test_in_place_only_experts_with_rows_are_touched():
    experts = accumulate_in_place(experts_of())
    step(experts, hit=4)
    experts.down_proj.grad[3] = torch.nan  # would spread to nothing, and stay, if it is not touched
    version = experts.gate_up_proj.grad[3].clone()
    step(experts, seed=1, hit=2)
    assert experts.down_proj.grad[3].isnan().all()
    assert torch.equal(experts.gate_up_proj.grad[3], version)


def test_a_second_use_of_the_experts_in_one_pass_adds_up():
    experts, twin = accumulate_in_place(experts_of()), experts_of()
    for each in (experts, twin):
        step(each)
        step(each, loss=lambda y: (y * y).sum())
        x, routing = (
            torch.randn(2, 8, generator=torch.Generator().manual_seed(3)),
            assign(torch.tensor([[0], [1]]), torch.ones(2, 1), 4),
        )
        once = backends.run("onednn", x, routing, each)
        backends.run("onednn", once, routing, each).sum().backward()
    for found, expected in zip(experts.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_weight_with_a_hook_is_handed_its_gradient(kind):
    experts, seen = accumulate_in_place(experts_of()), []
    step(experts)
    getattr(experts.down_proj, kind)(lambda tensor: seen.append(tensor))
    step(experts)
    assert len(seen) == 1


def test_without_permission_nothing_is_added_in_place():
    weight = torch.nn.Parameter(torch.randn(2, 3, 4))
    weight.grad = torch.ones_like(weight)
    assert not place_for(weight, [1, 1]).adds
    accumulate_in_place(torch.nn.ParameterList([weight]))
    place = place_for(weight, [1, 1])
    assert place.adds
    assert place.gradient is None
    assert place.into.data_ptr() == weight.grad.data_ptr()


def test_the_sum_of_a_transposed_view_lies_in_the_gradient_of_its_parameter():
    weight = torch.nn.Parameter(torch.randn(2, 3, 4))
    weight.grad = torch.arange(24.0).view(2, 3, 4)
    accumulate_in_place(torch.nn.ParameterList([weight]))
    assert torch.equal(place_for(weight.transpose(1, 2), [1, 1]).into, weight.grad.transpose(1, 2))
    assert torch.equal(place_for(weight[1:], [1]).into, weight.grad[1:])
