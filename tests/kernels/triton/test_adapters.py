"""Low-rank experts by kernels against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moeify import MoE, assign, backends
from moeify.backends import compose
from moeify.backends.triton import rows_by_token
from moeify.experts import LoRA
from moeify.kernels.triton import sparse_adapters
from moeify.kernels.triton.adapters import naive_sparse_adapters
from moeify.routers import TopK
from strategies import agree, choices, gradients, seeds
from triton_problems import DEVICE, decisions, moved

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")


def adapters(width: int = 40, width_out: int = 36, rank: int = 3, num_experts: int = 4, **options) -> LoRA:
    """Low-rank experts that do not start at nothing, each with a scale of its own."""
    lora = LoRA(num_experts, width, width_out, rank=rank, **options)
    nn.init.normal_(lora.lora_B)
    lora.scale.uniform_(0.5, 2)
    return lora.to(DEVICE)


def tokens(count=11, width=40):
    return torch.randn(count, width, device=DEVICE, requires_grad=True)


def agrees(x, routing, lora):
    leaves = [x, routing.weight, *lora.parameters()]
    agree(
        backends.run("triton", x, routing, lora), leaves, compose(x, routing, lora), leaves, rtol=1e-4, atol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("decision", decisions())
def test_every_form_of_decision(decision):
    routing = decisions()[decision]
    agrees(tokens(*routing.shape), routing, adapters())


@settings(max_examples=4)
@given(choices(max_tokens=5, max_experts=4), st.tuples(*[st.integers(1, 37)] * 3), seeds)
def test_any_widths_and_any_rank(choice, sizes, seed):
    torch.manual_seed(seed)
    width, width_out, rank = sizes
    agrees(tokens(len(choice[0]), width), moved(assign(*choice)), adapters(width, width_out, rank, choice[2]))


def test_the_weight_may_be_taken_in_between_the_maps():
    x, routing, lora = tokens(), decisions()["k choices"], adapters()
    maps = x, lora.lora_A, lora.lora_B, lora.scale, routing.source, routing.weight, routing.counts
    leaves = [x, routing.weight, *lora.parameters()]
    agree(
        sparse_adapters(*maps, *rows_by_token(routing)),
        leaves,
        naive_sparse_adapters(*maps),
        leaves,
        rtol=1e-4,
        atol=1e-4,
    )


def test_no_wide_row_is_kept():
    x, routing, lora = tokens(), decisions()["k choices"], adapters()
    kept = {}

    def keep(tensor):
        if tensor.dim() == 2 and tensor.shape[1] > 1:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backends.run("triton", x, routing, lora)
    assert sum(kept.values()) == x.numel() + 2 * len(routing.source) * lora.rank


def test_autocast_computes_in_its_dtype():
    x, routing, lora = tokens(), decisions()["k choices"], adapters()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = backends.run("triton", x, routing, lora)
    assert y.dtype == torch.bfloat16
    exact, leaves = compose(x, routing, lora), [x, routing.weight, *lora.parameters()]
    for a, b in zip([y, *gradients(y.cpu(), leaves)], [exact, *gradients(exact.cpu(), leaves)], strict=True):
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm()


def test_it_is_captured_whole_by_the_compiler():
    torch._dynamo.reset()
    layer = MoE(TopK(40, 4, k=2), adapters(width_out=40), backend="triton").to(DEVICE)
    x = tokens()
    leaves = [x, *layer.parameters()]
    agree(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), leaves, layer(x), leaves)


def test_dropout_before_the_maps_is_refused_in_training():
    x, routing, lora = tokens(), decisions()["k choices"], adapters(dropout=0.1)
    with pytest.raises(ValueError, match="not support dropout before low-rank projections"):
        backends.run("triton", x, routing, lora)
    agrees(x, routing, lora.eval())
