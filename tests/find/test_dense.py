"""Reading a module as `down(act(up(x)))` or `down(act(gate(x)) · up(x))`, by what it computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from moeify.experts import Glu, Plain
from moeify.find.dense import DenseFFN, dropouts, is_linear, matrix, output_error, read
from plain_models import Gated, Strange


class Mlp(nn.Module):
    """down(dropout(act(up(x)))), then dropout."""

    def __init__(self, act, linear=nn.Linear, inner: float = 0.0, outer: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = linear(12, 8), linear(8, 12)
        self.act = act
        self.inner, self.outer = nn.Dropout(inner), nn.Dropout(outer)

    def forward(self, x):
        return self.outer(self.down(self.inner(self.act(self.up(x)))))


class Fused(nn.Module):
    """One map whose output is a gate and what is gated, in either order."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.gate_first = gate_first

    def forward(self, x):
        parts = self.both(x).chunk(2, dim=-1)
        gate, up = parts if self.gate_first else parts[::-1]
        return self.down(F.silu(gate) * up)


def linears(module):
    return [part for part in module.modules() if is_linear(part)]


@given(bias=st.booleans(), width=st.integers(1, 6), hidden=st.integers(1, 6))
def test_a_gated_network_is_read_whatever_its_names_and_sizes(bias, width, hidden):
    module = Gated(width, hidden, bias).double()
    reading = read(module, linears(module))
    x = torch.randn(3, 7, width, dtype=torch.float64)
    torch.testing.assert_close(reading(x), module(x))
    assert reading.width == reading.width_out == width
    if hidden != width:
        assert reading.hidden == hidden


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), F.elu, torch.sin])
@pytest.mark.parametrize("linear", [nn.Linear, lambda inputs, outputs: Conv1D(outputs, inputs)])
def test_a_plain_network_is_read_with_its_own_activation(act, linear):
    module = Mlp(act, linear)
    reading = read(module, linears(module))
    x = torch.randn(5, 8)
    assert isinstance(reading.activation, Plain)
    torch.testing.assert_close(reading(x), module(x))


def test_a_fused_gate_is_read_if_it_comes_first():
    module = Fused(gate_first=True)
    reading = read(module, linears(module))
    x = torch.randn(5, 8)
    assert isinstance(reading.activation, Glu)
    torch.testing.assert_close(reading(x), module(x))


@pytest.mark.parametrize("module", [Strange(), Fused(gate_first=False)], ids=["sort", "gate last"])
def test_what_computes_something_else_is_not_read(module):
    assert read(module, linears(module)) is None


def test_a_difference_beyond_rounding_is_seen():
    module = Gated()
    reading = read(module, linears(module))
    assert output_error(module, reading, 8) < 64
    reading.down = nn.Linear(12, 8, bias=False)
    assert output_error(module, reading, 8) > 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 1000))
def test_gate_and_up_are_told_apart_even_in_half_precision_and_at_small_weights(dtype, seed):
    torch.manual_seed(seed)
    module = Gated(16, 32)
    for linear in linears(module):
        nn.init.normal_(linear.weight, std=0.02)
    module.to(dtype)
    assert read(module, linears(module)).ups[0] is module.beta


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), F.relu])
def test_an_activation_that_only_code_names_is_found(act):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.down(act(self.up(x)))

    module = Hidden().bfloat16()
    x = torch.randn(64)
    torch.testing.assert_close(read(module, linears(module)).activation(x), act(x))


@pytest.mark.parametrize("inner", [0.0, 0.1])
@pytest.mark.parametrize("outer", [0.0, 0.3])
def test_dropout_is_told_by_what_it_drops(inner, outer):
    module = Mlp(nn.ReLU(), inner=inner, outer=outer).train()
    assert dropouts(module, read(module, linears(module))) == (inner, outer)
    assert module.training


def test_reading_leaves_no_hook_and_no_gradient():
    module = Mlp(nn.ReLU(), inner=0.1, outer=0.1)
    dropouts(module, read(module, linears(module)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_matrix_of_a_conv1d_is_the_transpose_of_its_weight():
    conv = Conv1D(12, 8)
    assert matrix(conv).shape == (12, 8)
    x = torch.randn(3, 8)
    torch.testing.assert_close(F.linear(x, matrix(conv), conv.bias), conv(x))


def test_weights_of_a_reading_are_the_models_own():
    up, down = nn.Linear(8, 12), nn.Linear(12, 8)
    reading = DenseFFN([up], down, Plain(F.relu))
    assert reading.ups[0].weight is up.weight
    assert {id(p) for p in reading.parameters()} == {id(p) for p in (*up.parameters(), *down.parameters())}


def test_without_values_the_first_reading_is_taken():
    with torch.device("meta"):
        module = Mlp(nn.ReLU())
    reading = read(module, linears(module))
    assert reading is not None
    assert reading.width == 8
