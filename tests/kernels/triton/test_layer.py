"""Whole layers by kernels against the definition, and the promises they make."""

from copy import deepcopy
from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, library
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

from moeify import MoE, assign, backends
from moeify.backends import compose, order
from moeify.backends.triton import rows_by_token
from moeify.experts import FFN
from moeify.hf.interface import HfExperts, use_transformers_backends
from moeify.kernels.stacked import SWIGLU
from moeify.kernels.triton import sparse_ffn
from moeify.routers import TopK
from strategies import agree, choices, gradients, seeds, sharpen
from test_matrix import IDS, ROUTERS, D, E
from triton_problems import ACTIVATIONS, DEVICE, decisions, experts, moved

pytestmark = pytest.mark.usefixtures("uninitialised_memory_is_nan")
REFUSED = {
    "soft": "it needs an Assignment",
    "default vector": "this router adds a default output to every token",
    "weighted inputs": "it weights expert outputs",
    **dict.fromkeys(("mmoe", "cgc", "ple", "bounded union"), "it needs one weight per row"),
}


def agrees(x, routing, ffn, tolerance=1e-4):
    leaves = [x, routing.weight, *ffn.parameters()]
    agree(
        backends.run("triton", x, routing, ffn), leaves, compose(x, routing, ffn), leaves,
        rtol=tolerance, atol=tolerance,
    )  # fmt: skip


def tokens(count=11, width=40, dtype=torch.float32):
    return torch.randn(count, width, device=DEVICE, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "geglu", "clamped"])
def test_activations_with_a_bias(activation):
    agrees(tokens(), decisions()["k choices"], experts(ACTIVATIONS[activation], bias=True))


@pytest.mark.parametrize("decision", decisions())
def test_every_form_of_decision(decision):
    routing = decisions()[decision]
    agrees(tokens(*routing.shape), routing, experts(SWIGLU, bias=False))


def agrees_as_a_whole(x, routing, ffn, tolerance):
    """The error of every output and gradient is small beside it; single numbers of half precision may cancel."""
    exact_x, exact_ffn = x.detach().double().requires_grad_(), deepcopy(ffn).double()
    y, exact = backends.run("triton", x, routing, ffn), compose(exact_x, routing, exact_ffn)
    found = [y, *gradients(y.cpu(), [x, routing.weight, *ffn.parameters()])]
    right = [exact, *gradients(exact.cpu(), [exact_x, routing.weight, *exact_ffn.parameters()])]
    for a, b in zip(found, right, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    ffn = experts(SWIGLU, bias=True, width_out=40).to(dtype)
    agrees_as_a_whole(tokens(dtype=dtype), decisions()["k choices"], ffn, tolerance)


@settings(max_examples=5)
@given(
    choices(max_tokens=5, max_experts=4),
    st.tuples(*[st.integers(1, 37)] * 3),
    st.sampled_from(list(ACTIVATIONS)),
    st.booleans(),
    seeds,
)
def test_any_decision_and_any_widths(choice, widths, activation, bias, seed):
    torch.manual_seed(seed)
    width, hidden, width_out = widths
    ffn = experts(ACTIVATIONS[activation], bias, width=width, hidden=hidden, width_out=width_out, num_experts=choice[2])
    agrees(tokens(len(choice[0]), width), moved(assign(*choice)), ffn)


@pytest.mark.nightly
def test_strides_do_not_matter():
    x = torch.randn(40, 11, device=DEVICE).t().requires_grad_()
    routing = decisions()["k choices"]
    weight = torch.rand(1, device=DEVICE, requires_grad=True)
    routing = replace(routing, weight=weight.expand(len(routing.source)))
    ffn = experts(SWIGLU, bias=True)
    leaves = [x, weight, *ffn.parameters()]
    agree(backends.run("triton", x, routing, ffn), leaves, compose(x, routing, ffn), leaves, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        gates = routing.choices.weights[:, :1].expand(-1, 2)
        routing = replace(
            routing, choices=replace(routing.choices, weights=gates), weight=gates.reshape(-1)[routing.source * 2]
        )
        torch.testing.assert_close(
            backends.run("decode", x, routing, ffn), compose(x, routing, ffn), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("frozen", ["tokens", "weights of the decision", "experts"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, routing, ffn = tokens(), decisions()["k choices"], experts(SWIGLU, bias=True)
    groups = {"tokens": [x], "weights of the decision": [routing.weight], "experts": list(ffn.parameters())}
    for leaf in groups.pop(frozen):
        leaf.requires_grad_(False)
    leaves = [*chain(*groups.values())]
    agree(backends.run("triton", x, routing, ffn), leaves, compose(x, routing, ffn), leaves, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_tokens_and_what_goes_into_the_activation_are_all_that_is_kept(bias):
    x, routing, ffn = tokens(), decisions()["k choices"], experts(SWIGLU, bias)
    order, begin = rows_by_token(routing)
    known = {t.data_ptr() for t in (routing.weight, routing.source, routing.counts, order, begin, *ffn.parameters())}
    kept = []

    def keep(tensor):
        if tensor.data_ptr() not in known:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sparse_ffn(x, ffn.stacked, routing.source, routing.weight, routing.counts, order, begin)
    rows = len(routing.source)
    assert sum(kept) == x.element_size() * (x.numel() + rows * 2 * ffn.hidden)


@pytest.mark.parametrize(
    ("backend", "numbers"),
    [("triton", 11 * 40 + 22 * 2 * 24), ("transformers/grouped_mm", 22 * (2 * 40 + 4 * 24))],  # T·D + R·2H, R·(2D + 4H)
)
def test_fewer_numbers_are_kept_than_transformers_keeps(backend, numbers, monkeypatch):
    monkeypatch.setattr(order, "_ORDER", list(order._ORDER))
    use_transformers_backends()
    x, ffn = tokens(), experts(SWIGLU, bias=False, width_out=40)
    routing = assign(decisions()["k choices"].choices.indices, torch.rand(11, 2, device=DEVICE, requires_grad=True), 4)
    kept = {}

    def keep(tensor):
        if tensor.dim() == 2 and tensor.shape[1] > 1:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backends.run(backend, x, routing, ffn)
    assert sum(kept.values()) == numbers * x.element_size()


def test_nothing_is_kept_without_a_gradient():
    x, routing, ffn = tokens(), decisions()["k choices"], experts(SWIGLU, bias=False)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        backends.run("triton", x, routing, ffn)
    assert not kept


def test_twice_is_the_same_to_the_last_bit():
    x, routing, ffn = tokens(), decisions()["any number"], experts(SWIGLU, bias=True)
    leaves = [x, routing.weight, *ffn.parameters()]
    runs = [backends.run("triton", x, routing, ffn) for _ in range(2)]
    assert torch.equal(*runs)
    assert all(map(torch.equal, *(gradients(y.cpu(), leaves) for y in runs)))


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_parameters():
    x, routing, ffn = tokens(), decisions()["k choices"], experts(SWIGLU, bias=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = backends.run("triton", x, routing, ffn)
    assert y.dtype == torch.bfloat16
    exact = compose(x, routing, ffn)
    leaves = [x, routing.weight, *ffn.parameters()]
    for a, b in zip([y, *gradients(y.cpu(), leaves)], [exact, *gradients(exact.cpu(), leaves)], strict=True):
        assert a is y or a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm()


@pytest.mark.nightly
def test_activations_may_be_computed_anew():
    x, routing, ffn = tokens(), decisions()["k choices"], experts(SWIGLU, bias=False)
    leaves = [x, routing.weight, *ffn.parameters()]
    anew = checkpoint(backends.run, "triton", x, routing, ffn, use_reentrant=False)
    agree(anew, leaves, backends.run("triton", x, routing, ffn), leaves)


@pytest.fixture
def one_rank():
    distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", store=distributed.HashStore(), rank=0, world_size=1
    )
    yield distributed.init_device_mesh(DEVICE, (1,))
    distributed.destroy_process_group()


def test_parameters_may_be_sharded(one_rank):
    layer = MoE(TopK(40, 4, k=2), experts(SWIGLU, bias=True, width_out=40), backend="triton").to(DEVICE)
    whole, x = deepcopy(layer), tokens()
    fully_shard(layer, mesh=one_rank)
    y, right = layer(x), whole(x)
    assert torch.equal(y, right)
    y.square().sum().backward()
    right.square().sum().backward()
    for found, alone in zip(layer.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found.grad.full_tensor(), alone.grad)


def layer_with(router):
    layer = MoE(ROUTERS[router](), FFN(E, D, 6), backend="triton").to(DEVICE)
    layer.context.call.inputs["input_ids"] = IDS.to(DEVICE)
    sharpen(layer)
    return layer


@pytest.mark.nightly
@pytest.mark.parametrize("router", [name for name in ROUTERS if name not in REFUSED])
def test_every_router(router):
    fast = layer_with(router)
    slow = deepcopy(fast)
    slow.backend, slow.context = "compose", fast.context
    x, output = torch.randn(3, 4, D, device=DEVICE, requires_grad=True), []
    for layer in (fast, slow):
        torch.manual_seed(1)
        output.append((layer(x), [x, *layer.parameters()]))
    agree(*output[0], *output[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", REFUSED)
def test_other_decisions_are_refused_with_a_reason(router):
    with pytest.raises(ValueError, match=REFUSED[router]):
        layer_with(router)(torch.randn(3, 4, D, device=DEVICE))


def test_it_is_captured_whole_by_the_compiler():
    torch._dynamo.reset()
    layer = MoE(TopK(40, 4, k=2), experts(SWIGLU, bias=True, width_out=40), backend="triton").to(DEVICE)
    x = tokens()
    leaves = [x, *layer.parameters()]
    agree(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), leaves, layer(x), leaves)


def test_the_operators_keep_the_promises_of_custom_operators():
    x, routing, ffn = tokens(5), decisions(5)["k choices"], experts(SWIGLU, bias=True)
    decision = routing.weight, routing.source, routing.counts, *rows_by_token(routing)
    library.opcheck(
        torch.ops.moeify.sparse_ffn,
        (x, *ffn.up, *ffn.down, *decision, "silu", True, 0.0, 0.0, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_the_layer_of_a_model_of_transformers_whose_weights_lie_transposed():

    config = GptOssConfig(hidden_size=40, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    theirs = GptOssExperts(config).to(DEVICE)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    agrees(tokens(), decisions()["k choices"], HfExperts(theirs))
