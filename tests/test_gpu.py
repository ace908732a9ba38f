"""The layer on a CUDA device against the layer on the CPU: `make gpu` runs this, and then the benchmark."""

from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from moeify import MoE, kernels
from moeify.experts import FFN
from moeify.routers import TopK
from test_matrix import EXPERTS, IDS, ROUTERS, D

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_computes_on_the_gpu_what_it_computes_on_the_cpu(router, experts):
    layer = MoE(ROUTERS[router](), EXPERTS[experts]()).eval()
    layer.context.call.inputs["input_ids"] = IDS
    there = deepcopy(layer).cuda()
    there.context.call.inputs["input_ids"] = IDS.cuda()
    x = torch.randn(3, 4, D, requires_grad=True)
    z = x.detach().cuda().requires_grad_()
    y, w = layer(x), there(z)
    assert_close(w.cpu(), y, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    w.backward(upstream.cuda())
    assert_close(z.grad.cpu(), x.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize(("width", "out"), [(64, 128), (128, 64), (40, 24), (43, 17)])
def test_the_grouped_product_of_torch_is_the_definition(rows, width, out):
    counts = torch.zeros(5, dtype=torch.int64)
    counts[[0, 3]] = torch.tensor([rows // 3, rows - rows // 3])  # experts without rows, and one with most
    left = torch.randn(rows, width).bfloat16()
    weight = torch.randn(5, out, width).bfloat16() / width**0.5
    upstream = torch.randn(rows, out).bfloat16()
    results = []
    for function, device in ((kernels.grouped_linear, "cuda"), (kernels.naive_grouped_linear, "cpu")):
        a, b = (t.to(device, copy=True).requires_grad_() for t in (left, weight))
        y = function(a, b, counts.to(device))
        y.backward(upstream.to(device))
        results.append([t.float().cpu() for t in (y, a.grad, b.grad)])
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=2e-2, atol=2e-2)


def test_gathering_is_deterministic():
    layer = MoE(TopK(64, 8), FFN(8, 64, 128), backend="gather").cuda()
    x = torch.randn(512, 64, device="cuda")
    assert all(torch.equal(layer(x), layer(x)) for _ in range(5))


def test_the_layer_compiles_whole():
    layer = MoE(TopK(64, 8), FFN(8, 64, 128)).cuda().bfloat16()
    x = torch.randn(256, 64, device="cuda").bfloat16()
    assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=5e-2, atol=5e-2)
