"""Kernels for a GPU on a machine without one: they say why they do not serve a call."""

import dataclasses

import pytest
import torch

from moeify import MoE, assign, backends
from moeify.experts import FFN, Identity
from moeify.kernels.stacked import ClampedSwiGlu, Glu
from moeify.routers import TopK

X = torch.randn(3, 4)
KERNELS = ["triton", "decode", "liger", "sonicmoe"]


def decision(*gates):
    return assign(torch.tensor([[0, 1]] * 3), torch.ones(3, 2, *gates), 2)


def weighted_inputs():
    return dataclasses.replace(decision(), input_weight=torch.ones(6))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_layer_on_the_cpu_is_refused_in_words(backend):
    layer = MoE(TopK(4, 2), FFN(2, 4, 3), backend=backend)
    with torch.no_grad(), pytest.raises(ValueError, match=r"NVIDIA GPUs|pip install 'moeify\[gpu\]'"):
        layer(X)


@pytest.mark.parametrize("backend", ["triton", "decode"])
@pytest.mark.parametrize(
    ("reason", "routing", "experts"),
    [
        ("several gates", decision(3), FFN(2, 4, 3)),
        ("stacked weights .* these are Identity", decision(), Identity(2)),
        ("supports the activations silu, .* not ", decision(), FFN(2, 4, 3, activation=Glu(torch.tanh))),
        ("and not ClampedSwiGlu", decision(), FFN(2, 4, 3, activation=ClampedSwiGlu())),
        ("weights what the experts read", weighted_inputs(), FFN(2, 4, 3)),
        ("weights are torch.float64", decision(), FFN(2, 4, 3).double()),
        ("these are FFN", decision(), FFN(2, 4, 3, dropout=0.5)),
    ],
)
def test_what_kernels_do_not_know_is_refused_in_words(backend, reason, routing, experts):
    with torch.no_grad(), pytest.raises(ValueError, match=f"backend '{backend}' cannot run this layer: .*{reason}"):
        backends.run(backend, X, routing, experts)


@pytest.mark.parametrize("backend", ["liger", "sonicmoe"])
def test_kernels_of_others_are_only_taken_by_name(backend):
    assert not backends.find_backend(backend).chosen(X, decision(), FFN(2, 4, 3))
