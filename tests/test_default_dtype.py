"""Torch's default dtype, which programs set while models are built or run, changes nothing that is in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from moeify.compress import quantize_experts
from moeify.compress.quantize import quantize_module
from moeify.experts import LoRA
from moeify.kernels.cpu import cpp
from moeify.routers import DefaultVector, ExpertThreshold, TopK
from moeify.serve import fast_decode
from strategies import layer
from tiny_models import causal_lm

needs_kernel = pytest.mark.skipif(cpp.why_not() is not None, reason="no C++ kernel here")


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def same_under_any_default(run) -> None:
    expected = run()
    for dtype in (torch.float64, torch.bfloat16):
        with default(dtype), torch.no_grad():
            found = run()
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["compose", "gather", "onednn", "recompute", pytest.param("cpp", marks=needs_kernel)])
def test_a_layer_computes_the_same(name):
    moe, x = layer().eval(), torch.randn(9, 8)
    moe.backend = name
    with torch.no_grad():
        same_under_any_default(lambda: moe(x))


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_compute_the_same(bits):
    model, x = quantize_experts(nn.Sequential(layer(), nn.Linear(8, 8)).eval(), bits=bits), torch.randn(9, 8)
    model[0].backend = "cpp"
    quantize_module(model, "1", bits)
    with torch.no_grad():
        same_under_any_default(lambda: model(x))


@needs_kernel
def test_a_decoder_generates_the_same():
    model = fast_decode(causal_lm("llama"))
    prompt = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    same_under_any_default(lambda: model.generate(prompt, **settings))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TopK(8, 4, selection_bias=True), "selection_bias"),
        (lambda: ExpertThreshold(8, 4), "selection_bias"),
        (lambda: DefaultVector(8, 4), "default"),
        (lambda: LoRA(4, 8), "scale"),
    ],
)
def test_buffers_that_are_summed_up_are_in_fp32(build, name):
    with default(torch.bfloat16):
        assert getattr(build(), name).dtype is torch.float32
