"""Weights in huge pages: where they lie, once, with the same values, and never in a child that shares them."""

import multiprocessing
import re
import sys
from pathlib import Path

import pytest
import torch

from moeify import MoE
from moeify.experts import FFN
from moeify.kernels.cpu import huge_pages
from moeify.kernels.cpu.huge_pages import in_place
from moeify.routers import TopK

SIZE = 2**24  # of a tensor in fp32: 64 MiB, which malloc always maps by itself


def in_huge_pages(tensor):
    """KiB of huge pages in the mapping that a tensor lies in."""
    for lines in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        low, high = (int(end, 16) for end in lines.split(" ", 1)[0].split("-"))
        if low <= tensor.data_ptr() + tensor.nbytes // 2 < high:
            return int(re.search(r"AnonHugePages: *(\d+)", lines).group(1))
    raise AssertionError("the tensor lies in no mapping")


def filled():
    return torch.full((SIZE,), 0.5)


@pytest.fixture(autouse=True)
def supported():
    """Skip where the system does not collapse pages when asked to."""
    if sys.platform != "linux" or huge_pages.advise() is None:
        pytest.skip("this system has no huge pages to ask for")
    huge_pages._ASKED.clear()
    tensor = filled()
    in_place(tensor)
    if in_huge_pages(tensor) == 0:
        pytest.skip("this kernel collapses no pages when asked to: older than 6.1, or switched off")
    huge_pages._ASKED.clear()


def test_a_large_weight_keeps_its_place_and_values():
    weight = torch.arange(SIZE)
    address, before = weight.data_ptr(), weight.clone()
    in_place(weight)
    assert weight.data_ptr() == address
    assert torch.equal(weight, before)
    assert in_huge_pages(weight) >= 8 * 2**10


def test_the_system_is_asked_once_for_a_large_tensor_and_its_transpose_and_never_for_a_small_one(monkeypatch):
    asked = []
    monkeypatch.setattr(huge_pages, "advise", lambda: lambda *call: asked.append(call) or 0)
    weight = filled()
    in_place(weight)
    first = len(asked)
    assert first > 0
    in_place(weight)
    in_place(weight.view(2, -1).t())
    assert all(start % 4096 == size % 4096 == 0 for start, size, _ in asked)
    assert all(weight.data_ptr() <= s < s + n <= weight.data_ptr() + weight.nbytes for s, n, _ in asked)
    in_place(torch.ones(1000))
    assert len(asked) == first


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_asks_for_the_weights_of_its_experts(training):
    layer = MoE(TopK(256, 16), FFN(16, 256, 1024))
    with torch.set_grad_enabled(training):
        layer(torch.randn(4, 256))
    for weight in layer.experts.parameters():
        assert huge_pages._ASKED[weight.data_ptr()] == weight.nbytes


def child(queue):
    asked = []
    huge_pages.advise = lambda: lambda *call: asked.append(call) or 0
    in_place(filled())
    queue.put(len(asked))


def test_a_child_leaves_the_pages_that_it_shares_with_its_parent():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == 0
    process.join()
