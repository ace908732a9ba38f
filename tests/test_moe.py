"""Laws of the whole layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moeify import MoE, losses, record
from moeify.experts import FFN, Each, Identity
from moeify.routers import Capacity, ExpertChoice, Soft, TopK, sigmoid
from strategies import agree, gradients, layer, masks, seeds

LOSSES = {"balance": losses.balance, "importance": losses.importance, "load": losses.load_loss, "z": losses.z}


# Laws


@given(seeds)
def test_the_order_of_tokens_does_not_matter(seed):
    torch.manual_seed(seed)
    moe, x, order = layer(), torch.randn(9, 8), torch.randperm(9)
    torch.testing.assert_close(moe(x[order]), moe(x)[order])


@pytest.mark.parametrize("router", [TopK(8, 4), Capacity(TopK(8, 4)), ExpertChoice(8, 4), Soft(8, 4)])
def test_one_token_needs_no_other_dimension(router):
    moe, x = MoE(router, FFN(4, 8, 16)), torch.randn(8)
    torch.testing.assert_close(moe(x), moe(x[None])[0])


@pytest.mark.parametrize(
    ("tokens", "got"),
    [(torch.ones(3, 8, dtype=torch.long), "torch.int64"), (torch.ones(3, 8) * 1j, "torch.complex64"), ([0.0], "list")],
)
def test_tokens_of_other_dtypes_are_refused(tokens, got):
    with pytest.raises(TypeError, match=f"a sparse layer takes tokens of a floating-point dtype, but got .*{got}"):
        layer()(tokens)


@given(st.integers(1, 5), seeds)
def test_using_every_expert_is_the_dense_mixture(num_experts, seed):
    torch.manual_seed(seed)
    moe = layer(num_experts=num_experts, k=num_experts)
    x = torch.randn(7, 8)
    gates = (x @ moe.router.weight.T).softmax(-1)  # (T, E)
    everyone = [moe.experts(x, 7 * F.one_hot(torch.tensor(e), num_experts)) for e in range(num_experts)]
    torch.testing.assert_close(moe(x), torch.einsum("te,eto->to", gates, torch.stack(everyone)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_the_dense_ffn_bit_for_bit(dtype):
    experts = FFN(1, 16, 24).to(dtype)
    x = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True)
    y = MoE(TopK(16, 1, k=1), experts)(x)

    up, down = (p.detach()[0].requires_grad_() for p in experts.parameters())
    gate, value = F.linear(x, up).chunk(2, -1)
    dense = F.linear(F.silu(gate) * value, down)
    assert torch.equal(y, dense)
    assert torch.equal(*(gradients(out, [x])[0] for out in (y, dense)))


@given(seeds)
def test_identical_experts_act_as_one_when_weights_sum_to_one(seed):
    torch.manual_seed(seed)
    moe = layer(k=2)
    for p in moe.experts.parameters():
        p.data.copy_(p.data[:1].expand_as(p))
    x = torch.randn(7, 8)
    torch.testing.assert_close(moe(x), moe.experts(x, torch.tensor([7, 0, 0, 0])))


def test_groups_do_not_see_each_other():
    moe, x = layer(per="sequence"), torch.randn(3, 5, 8)
    other = x.clone()
    other[1] = torch.randn(5, 8)
    assert torch.equal(moe(x)[[0, 2]], moe(other)[[0, 2]])


def test_group_routing_keeps_a_sequence_together():
    moe = nn.Sequential(layer(per="sequence"))
    with record(moe) as decisions:
        moe(torch.randn(3, 5, 8))
    chosen = decisions["0"].choices.indices.view(3, 5, -1)
    assert torch.equal(chosen, chosen[:, :1].expand_as(chosen))


ROUTERS = {
    "topk": {},
    "sigmoid": {"score": sigmoid, "selection_bias": True, "scale": 2.5},
    "capacity": {"router": lambda *sizes: Capacity(TopK(*sizes), factor=0.5, priority="score", overflow="renormalize")},
}


@pytest.mark.parametrize("name", ROUTERS)
@given(masks(), seeds)
def test_padding_changes_no_bit_of_any_token_or_loss_or_gradient(name, mask, seed):
    torch.manual_seed(seed)
    moe = layer(**ROUTERS[name])
    x = torch.randn(*mask.shape, 8)
    results = []
    for tokens, token_mask in ((x, mask), (x[mask], None)):
        tokens = tokens.clone().requires_grad_()
        moe.context.mask(token_mask)
        with record(nn.Sequential(moe)) as decisions:
            y = moe(tokens)
        routing = decisions["0"]
        y = y[mask] if token_mask is not None else y
        for_tokens, *for_parameters = gradients(y, [tokens, *moe.parameters()])
        for_tokens = for_tokens[mask] if token_mask is not None else for_tokens
        results.append([y, for_tokens, *for_parameters, *(loss(routing) for loss in LOSSES.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(masks(), seeds)
def test_what_stands_in_the_padding_is_never_read(mask, seed):
    torch.manual_seed(seed)
    moe = layer()
    moe.context.mask(mask)
    x = torch.randn(*mask.shape, 8)
    y = moe(x)
    assert torch.equal(moe(x.masked_fill(~mask.unsqueeze(-1), float("nan"))), y)
    assert y[~mask].count_nonzero() == 0


def test_a_shared_module_is_added_to_the_experts():
    shared = nn.Linear(8, 8)
    moe, x = layer(), torch.randn(5, 8)
    alone = moe(x)
    moe.shared = shared
    assert torch.equal(moe(x), alone + shared(x))


@given(st.sampled_from([(8,), (1, 1), (2, 3), (2, 2, 3)]))
def test_any_leading_shape_is_kept(shape):
    moe = MoE(TopK(8, 4), FFN(4, 8, 6, width_out=3))
    assert moe(torch.randn(*shape, 8)).shape == (*shape, 3)


@given(seeds)
def test_every_parameter_gets_a_finite_gradient(seed):
    torch.manual_seed(seed)
    moe = layer(bias=True)
    moe(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


# Bad inputs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(bad):
    moe = layer()
    moe.name = "layers.3.mlp"
    x = torch.randn(4, 8)
    x[2] = bad
    with pytest.raises(FloatingPointError, match=r"layers\.3\.mlp was given activations .* 1 of 4 tokens"):
        moe(x)


def test_a_router_for_another_number_of_experts_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="TopK routes to 2 experts, and FFN holds 4"):
        MoE(TopK(8, 2), FFN(4, 8, 16))
    moe = MoE(TopK(8, 4), FFN(4, 8, 16))
    experts = moe.experts
    with pytest.raises(ValueError, match="TopK routes to 4 experts, and FFN holds 3"):
        moe.replace(experts=FFN(3, 8, 16))
    assert moe.experts is experts


def test_a_mask_of_the_wrong_size_is_refused():
    moe = layer()
    moe.context.mask(torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match=r"\(1, 2\) = 2 tokens, but the layer was given 3"):
        moe(torch.randn(1, 3, 8))


# Compilation and checkpointing


def compiled_and_eager(moe, x, backend):
    torch._dynamo.reset()
    return torch.compile(moe, fullgraph=True, backend=backend)(x), moe(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_layer_compiles_into_one_graph(backend, dtype):
    moe, x = layer().to(dtype), torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    leaves = [x, *moe.parameters()]
    compiled, eager = compiled_and_eager(moe, x, backend)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    agree(compiled, leaves, eager, leaves, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [ROUTERS["sigmoid"], ROUTERS["capacity"], {"jitter": 0.0, "bias": True}])
def test_every_router_compiles_into_one_graph(options):
    moe, x = layer(**options), torch.randn(2, 5, 8, requires_grad=True)
    leaves = [x, *moe.parameters()]
    compiled, eager = compiled_and_eager(moe, x, "aot_eager")
    agree(compiled, leaves, eager, leaves)


def test_checkpointing_repeats_the_decision_and_its_gradient():
    moe, x = layer(), torch.randn(2, 5, 8, requires_grad=True)
    leaves = [x, *moe.parameters()]
    seen = []
    moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing.source))
    plain = gradients(moe(x), leaves)
    again = gradients(checkpoint(moe, x, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])


def test_checkpointing_records_a_decision_once():
    model = nn.Sequential(layer())
    with record(model) as decisions:
        y = checkpoint(model, torch.randn(2, 5, 8, requires_grad=True), use_reentrant=False)
        first = decisions["0"]
        y.sum().backward()
    assert decisions["0"] is first


def test_under_autocast_the_router_stays_in_fp32():
    moe, x = layer(), torch.randn(2, 5, 8)
    with record(nn.Sequential(moe)) as decisions, torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    routing = decisions["0"]
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.choices.weights.dtype == torch.float32
    assert torch.equal(routing.logits, F.linear(x.flatten(0, 1), moe.router.weight))


def test_any_module_may_be_an_expert():
    moe = MoE(TopK(8, 2), Each([nn.Sequential(nn.Linear(8, 3), nn.ReLU()), nn.Linear(8, 3)]))
    assert moe(torch.randn(4, 8)).shape == (4, 3)


def test_identity_experts_return_their_token():
    x = torch.randn(4, 8)
    torch.testing.assert_close(MoE(TopK(8, 3), Identity(3))(x), x)
