"""Sizes of tiles that are measured, and kept."""

import pytest
import torch
import triton

from moeify.kernels.triton import autotune
from moeify.kernels.triton.autotune import CANDIDATES, trial, tuned
from moeify.kernels.triton.config import Config
from triton_problems import DEVICE

SMALL, LARGE = Config(16, 16, 16, 4, 2), Config(64, 64, 16, 4, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "new"))


def test_the_fastest_is_measured_once_and_found_again():
    assert tuned("a", [SMALL, LARGE], lambda size: -size.m) == LARGE
    assert tuned("b", [SMALL, LARGE], lambda size: size.m) == SMALL
    assert tuned("a", [SMALL, LARGE], lambda size: pytest.fail("measured twice")) == LARGE


def test_what_a_gpu_has_no_room_for_is_passed_over():
    def measure(size):
        if size == SMALL:
            raise triton.runtime.errors.OutOfResources(300, 228, "shared memory")
        return 1.0

    assert tuned("a", [SMALL, LARGE], measure) == LARGE


@pytest.mark.parametrize("kernel", CANDIDATES)
@pytest.mark.parametrize("widths", [(32, 16, 16, 16), (16, 16, 16, 16), (24, 16)])
def test_every_kernel_has_a_trial(kernel, widths):
    if kernel != "activation_backward" or len(widths) == 4:
        trial(kernel, torch.device(DEVICE), torch.float32, 2, widths, SMALL, num_experts=2)()


def test_nothing_is_measured_unless_asked(monkeypatch):
    monkeypatch.delenv("MOEIFY_AUTOTUNE", raising=False)
    assert not autotune.measures()
