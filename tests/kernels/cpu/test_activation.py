"""The activation between two projections and its gradient against autograd, at every level of this processor."""

import pytest
import torch

from moeify.kernels.cpu import activation as activations
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.activation import hidden_units, with_pullback
from moeify.kernels.stacked import KNOWN, ClampedGlu, ClampedSwiGlu, Glu, Plain

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=[1, 3])
def kernel(level, request, monkeypatch):
    if reason := cpp.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(activations, "WORTH_COMPILING", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def check(activation, hidden, dtype):
    torch.manual_seed(0)
    before = (3 * torch.randn(7, activation.projections * hidden)).to(dtype)
    before[0, 0], before[-1, -1] = 0.0, -40.0  # where ReLU has a kink, and a sigmoid underflows
    gradient, scale = torch.randn(7, hidden).to(dtype), torch.rand(7)
    exact = before.double().requires_grad_()
    factor = scale.double().requires_grad_()
    units = activation(exact)
    (units * factor.unsqueeze(1) * gradient.double()).sum().backward()
    found, pullback = with_pullback(before, activation)
    assert torch.equal(found, hidden_units(before, activation))
    for one, other in ((found, units), *zip(pullback(gradient, scale), (exact.grad, factor.grad), strict=True)):
        scaled = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double() / scaled, other.detach() / scaled, rtol=0, atol=ROUNDING[dtype])


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("hidden", [1, 16, 43])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("gating", [Plain, Glu])
@pytest.mark.parametrize("name", KNOWN)
def test_the_kernel_is_the_activation_and_its_gradient(name, gating, dtype, hidden, monkeypatch):
    monkeypatch.setattr(torch, "enable_grad", lambda: pytest.fail("torch computes it"))
    check(gating(KNOWN[name]), hidden, dtype)


@pytest.mark.parametrize("activation", [ClampedGlu(), ClampedSwiGlu(), Glu(torch.tanh), Glu(torch.nn.functional.silu)])
def test_torch_computes_what_the_kernel_lacks(activation, monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "0")
    monkeypatch.setattr(activations, "WORTH_COMPILING", 0)
    check(activation, 16, torch.float32)
