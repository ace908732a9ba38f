"""The router of ZAYA against its formula, token by token, in fp64, and against two blocks of transformers in a row."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from moeify import Context, MoE, sparsify
from moeify.experts import FFN, Blocks, Zero
from moeify.routers import DepthAveraged
from moeify.sparsify import recipes
from strategies import agree, doubled, route
from tiny_models import causal_lm

T, D, S, E = 9, 6, 5, 4


def pair(k: int = 1) -> tuple[MoE, MoE]:
    """Two layers in a row, with parameters of unit variance; expert 3 skips the token."""
    context = Context()
    first = MoE(DepthAveraged(D, E, k=k, state=S), Blocks([FFN(3, D, 7), Zero()]), context=context)
    second = MoE(DepthAveraged(D, E, k=k, state=S), Blocks([FFN(3, D, 7), Zero()]), context=context)
    second.replace(router=second.router.link_to(first.router))
    for layer in (first, second):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        layer.router.selection_bias.normal_()
    return first, second


def erf_gelu(v):
    return v * (1 + torch.erf(v / math.sqrt(2))) / 2


@pytest.mark.parametrize("k", [1, 2])
def test_the_state_of_the_layer_before_is_read_too(k):
    first, second = pair(k)
    x = torch.randn(T, D, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    own = [doubled(layer.router) for layer in (first, second)]
    slow = []
    for token in x64:
        h = torch.zeros(S, dtype=torch.float64)
        for layer, p in zip((first, second), own, strict=True):
            h = p["down"] @ token + p["down_bias"] + (p["decay"] * h if "decay" in p else 0)
            read = h / torch.sqrt((h * h).mean() + 1e-5) * p["norm"]
            read = erf_gelu(p["first"] @ read + p["first_bias"])
            z = p["weight"] @ erf_gelu(p["second"] @ read + p["second_bias"])
            s = torch.exp(z) / torch.exp(z).sum()
            best = sorted(range(E), key=lambda e: -(s[e] + layer.router.selection_bias[e]).item())[:k]
        slow.append(
            torch.stack([s[e] if e in best and e < 3 else torch.zeros((), dtype=torch.float64) for e in range(E)])
        )
    first.router(x, first.context)
    fast = second.router(x, second.context).weight_table()
    read = [first.router.down, first.router.down_bias]  # all of the first layer that the second depends on
    slow_leaves = [x64, own[0]["down"], own[0]["down_bias"], *own[1].values()]
    agree(fast, [x, *read, *second.router.parameters()], torch.stack(slow), slow_leaves, rtol=1e-3)


def test_two_layers_are_two_blocks_of_zaya():
    from transformers.models.zaya.modeling_zaya import ZayaSparseMoeBlock

    config = AutoConfig.for_model(
        "zaya", hidden_size=D, num_attention_heads=2, num_key_value_heads=1, head_dim=4, moe_intermediate_size=7,
        num_experts=3, num_experts_per_tok=1, router_hidden_size=S, rms_norm_eps=1e-5, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    ours, theirs = pair(), [ZayaSparseMoeBlock(config, i) for i in range(2)]
    tensors = []
    for layer, block in zip(ours, theirs, strict=True):
        gate, router, experts = block.gate, layer.router, layer.experts.banks[0]
        mlp = gate.router_mlp
        tensors += [
            (router.down, gate.down_proj.weight), (router.down_bias, gate.down_proj.bias),
            (router.first, mlp.fc1.weight), (router.first_bias, mlp.fc1.bias), (router.second, mlp.fc2.weight),
            (router.second_bias, mlp.fc2.bias), (router.weight, mlp.out_proj.weight), (router.norm, mlp.norm.weight),
            (experts.gate_up_proj, block.experts.gate_up_proj), (experts.down_proj, block.experts.down_proj),
        ]  # fmt: skip
        gate.balancing_biases.copy_(router.selection_bias)
    tensors.append((ours[1].router.decay, theirs[1].gate.router_states_scale))
    assert len(tensors) == sum(len(list(module.parameters())) for module in theirs)
    with torch.no_grad():
        for own, other in tensors:
            other.copy_(own)
    x = torch.randn(2, T, D)
    y = ours[1](x + ours[0](x))
    middle, state = theirs[0](x)
    their_y, _ = theirs[1](x + middle, state)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    chosen = ours[1].router(x, ours[1].context).counts
    assert chosen[-1] > 0
    assert chosen[:-1].any()
    for output in (y, their_y):
        output.square().sum().backward()
    for own, other in tensors:
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))


def test_the_recipe_links_the_layers_of_a_model():
    model = sparsify(causal_lm("llama"), recipes["zaya"], verbose=False)
    first, second = (layer.mlp.router for layer in model.model.layers[:2])
    assert first.decay is None
    assert second.decay is not None
    model(input_ids=torch.arange(12).view(2, 6), labels=torch.arange(12).view(2, 6)).loss.backward()
    assert second.decay.grad.any()


def test_a_layer_alone_lacks_the_state_before():
    _, second = pair()
    with pytest.raises(ValueError, match="has left no state"):
        route(second.router, torch.randn(T, D))


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 5}, {"zero_experts": 4}])
def test_numbers_of_experts_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match="choose 1 <= k <= E"):
        DepthAveraged(D, E, **options)
