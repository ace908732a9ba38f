from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from moeify import MoE
from moeify.backends import compose
from moeify.compress import quantize_experts
from moeify.experts import FFN, ClampedGlu, Identity, Masked, Quantized, quantize
from moeify.experts.quantized import Weights
from moeify.routers import Compete, TopK
from strategies import route, seeds


def filled(matrices, bits, group_size=64):
    weights = Weights(*matrices.shape, bits, group_size)
    weights.fill(matrices, None)
    return weights


@given(st.integers(1, 200), st.sampled_from([32, 64]), seeds)
def test_eight_bits_err_by_half_a_step_and_four_bits_by_one(width, group_size, seed):
    torch.manual_seed(seed)
    w = torch.randn(2, 3, width)
    eight, four = filled(w, 8), filled(w, 4, group_size)
    for e in range(2):
        step = w[e].abs().amax(-1, keepdim=True) / 127
        assert ((eight.of(e, torch.float32) - w[e]).abs() <= 0.501 * step).all()
        for part, of in zip(w[e].split(group_size, -1), four.of(e, torch.float32).split(group_size, -1), strict=True):
            assert ((of - part).abs() <= 1.001 * part.abs().amax(-1, keepdim=True) / 8).all()


def test_the_layout_of_four_bits_is_as_described():
    numbers = torch.randint(-8, 8, (1, 1, 256)).float()
    numbers[..., ::32] = -8  # so that every scale is 1
    weights = filled(numbers, 4, 32)
    assert (weights.scales == 1).all()
    words = weights.weight[0, 0].view(torch.int16).int() & 0xFFFF
    for block in range(2):
        for quarter in range(4):
            for i in range(32):
                found = (words[32 * block + i] >> 4 * quarter & 15) - 8
                assert found == numbers[0, 0, 128 * block + 32 * quarter + i]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_answer_nearly_as_before(bits):
    experts = FFN(4, 64, 96, bias=True, width_out=32)
    rows, counts = torch.randn(9, 64), torch.tensor([4, 0, 2, 3])
    y, exact = quantize(experts, bits)(rows, counts), experts(rows, counts)
    assert (y - exact).norm() < {8: 0.01, 4: 0.15}[bits] * exact.norm()


def test_no_weight_is_held_twice():
    experts = FFN(4, 256, 128).bfloat16()
    before = sum(p.nbytes for p in experts.parameters())
    for bits, share in [(8, 0.52), (4, 0.29)]:
        quantized = quantize(experts, bits)
        assert not list(quantized.parameters())
        assert sum(b.nbytes for b in quantized.buffers()) < share * before


@pytest.mark.parametrize("bits", [8, 4])
def test_a_state_dict_brings_the_same_experts_back(bits):
    saved = quantize(FFN(3, 20, 12, activation=ClampedGlu(), bias=True), bits)
    loaded = Quantized(3, 20, 12, ClampedGlu(), bits=bits, up_bias=True, down_bias=True)
    loaded.load_state_dict(saved.state_dict())
    rows, counts = torch.randn(6, 20), torch.tensor([1, 2, 3])
    assert torch.equal(loaded(rows, counts), saved(rows, counts))


def test_scales_are_never_rounded():
    quantized = quantize(FFN(2, 16, 8, bias=True), 8)
    scales = quantized.up.scales.clone()
    quantized.bfloat16()
    assert torch.equal(quantized.up.scales, scales)
    assert quantized.up.bias.dtype == torch.bfloat16


def test_gradients_reach_the_rows():
    rows = torch.randn(3, 16, requires_grad=True)
    quantize(FFN(2, 16, 8), 4)(rows, torch.tensor([1, 2])).sum().backward()
    assert rows.grad.abs().amin(-1).gt(0).all()


def test_all_layers_of_a_model_and_the_routers_that_hold_their_experts():
    model = nn.Sequential(MoE(TopK(16, 4), FFN(4, 16, 8)), MoE(Compete(16, 4), Masked(FFN(4, 16, 8), 0.1))).eval()
    model.append(MoE(Compete(16, 4), FFN(4, 16, 8)).eval())
    before = deepcopy(model)
    assert quantize_experts(model, 8) is model
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(Quantized) == 3
    assert FFN not in kinds
    assert model[2].router._experts == (model[2].experts,)
    x = torch.randn(5, 16)
    moe, old = model[0], before[0]
    with torch.no_grad():
        torch.testing.assert_close(moe(x), compose(x, route(old.router, x), moe.experts))
        assert F.cosine_similarity(moe(x), old(x)).min() > 0.99


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("Identity cannot be quantised", lambda: quantize(Identity(2))),
        ("after model.eval()", lambda: quantize(FFN(2, 4, 3, dropout=0.5))),
        ("3 bits in groups of 64 are not supported", lambda: quantize(FFN(2, 4, 3), 3)),
        ("no feed-forward experts to quantise", lambda: quantize_experts(nn.Linear(2, 2))),
    ],
)
def test_what_cannot_be_quantised_is_refused(reason, call):
    with pytest.raises(ValueError, match=reason):
        call()
