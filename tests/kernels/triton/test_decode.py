"""Few tokens, weights read in place, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from moeify import assign, backends
from moeify.backends import compose
from moeify.experts.quantized import quantize
from moeify.hf.interface import HfExperts
from moeify.kernels.stacked import SWIGLU, Glu
from nights import nightly
from strategies import choices, seeds
from triton_problems import ACTIVATIONS, DEVICE, decisions, experts

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


@torch.no_grad()
def agrees(x, routing, ffn):
    torch.testing.assert_close(backends.run("decode", x, routing, ffn), compose(x, routing, ffn), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, bias):
    ffn = experts(ACTIVATIONS[activation], bias, hidden=10, width_out=9)
    agrees(torch.randn(3, 40, device=DEVICE), decisions(3)["k choices"], ffn)


@settings(max_examples=4)
@given(choices(max_tokens=3, max_experts=4), st.tuples(*[st.integers(1, 150)] * 3), seeds)
def test_any_decision_and_any_widths(choice, widths, seed):
    torch.manual_seed(seed)
    width, hidden, width_out = widths
    ffn = experts(SWIGLU, True, width=width, hidden=hidden, width_out=width_out, num_experts=choice[2])
    index, gates, num_experts = choice
    routing = assign(index.to(DEVICE), gates.to(DEVICE), num_experts)
    agrees(torch.randn(len(index), width, device=DEVICE), routing, ffn)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 32), (4, 64)])
@pytest.mark.parametrize("activation", ["swiglu", nightly("clamped"), nightly("gelu")])
def test_weights_of_few_bits_are_read_as_they_are(activation, bits, group_size):
    ffn = quantize(experts(ACTIVATIONS[activation], True, width=300, hidden=10, width_out=9), bits, group_size)
    agrees(torch.randn(2, 300, device=DEVICE), decisions(2)["k choices"], ffn)


def test_autocast_reads_the_weights_as_they_are():
    x, routing, ffn = torch.randn(3, 40, device=DEVICE), decisions(3)["k choices"], experts(SWIGLU, True)
    with torch.no_grad():
        exact = compose(x, routing, ffn)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = backends.run("decode", x, routing, ffn)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() <= 2e-2 * exact.norm()


def test_no_tokens():
    agrees(torch.randn(0, 40, device=DEVICE), decisions()["no token"], experts(SWIGLU, False))


def test_weights_that_lie_transposed():

    config = GptOssConfig(hidden_size=40, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    theirs = GptOssExperts(config).to(DEVICE)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    agrees(torch.randn(3, 40, device=DEVICE), decisions(3)["k choices"], HfExperts(theirs))


def test_it_is_captured_whole_by_the_compiler():
    torch._dynamo.reset()
    x, routing, ffn = torch.randn(3, 40, device=DEVICE), decisions(3)["k choices"], experts(Glu(torch.relu), True)
    with torch.no_grad():
        call = torch.compile(lambda x: backends.run("decode", x, routing, ffn), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(call(x), compose(x, routing, ffn), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decision", ["padding", "dropped", "any number"])
def test_a_decision_without_k_rows_for_every_token_is_refused(decision):
    with torch.no_grad(), pytest.raises(ValueError, match="every token"):
        backends.run("decode", torch.randn(11, 40, device=DEVICE), decisions()[decision], experts(SWIGLU, False))


def test_a_gradient_is_refused():
    x = torch.randn(3, 40, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="gradient"):
        backends.run("decode", x, decisions(3)["k choices"], experts(SWIGLU, False))
