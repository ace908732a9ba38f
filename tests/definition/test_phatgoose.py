"""PHATGOOSE against its equations: gates that are trained alone, and tokens that are routed by all of them."""

from functools import partial
from math import exp, sqrt

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, sparsify
from moeify.compose import load_gates, save_gates, set_gates
from moeify.experts import LoRA
from moeify.find import linears
from moeify.routers import Phatgoose, TopK, Uniform
from moeify.sparsify import frozen, lora
from moeify.train import train_gates
from strategies import agree, doubled, route
from tiny_models import TINY, inputs

D, OUT, E, K, T = 6, 5, 4, 2, 9


def layer() -> MoE:
    moe = MoE(Phatgoose(D, E, k=K), LoRA(E, D, OUT, rank=3, scale=0.5), nn.Linear(D, OUT))
    nn.init.normal_(moe.experts.lora_B)
    return moe


def standardised(v):
    mean = sum(v) / D
    variance = sum((a - mean) ** 2 for a in v) / D
    return [(a - mean) / (variance + 1e-5).sqrt() for a in v]


def test_the_layer_is_the_papers_loop_over_tokens():
    moe, x = layer(), torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for u in x64:
        gates = [standardised(p["router.weight"][j]) for j in range(E)]
        a = [sum(v * w for v, w in zip(gate, standardised(u), strict=True)) / sqrt(D) for gate in gates]
        s = [a[j].exp() / sum(b.exp() for b in a) for j in range(E)]
        kept = sorted(range(E), key=lambda j: -s[j].item())[:K]
        y = p["shared.weight"] @ u + p["shared.bias"]
        for j in kept:
            y = y + s[j] / sum(s[i] for i in kept) * 0.5 * p["experts.lora_B"][j] @ (p["experts.lora_A"][j] @ u)
        slow.append(y)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def test_neither_the_size_of_a_gate_nor_the_size_or_mean_of_a_token_decides():
    router, x = Phatgoose(D, E), 10 * torch.randn(T, D)
    before = route(router, x)
    router.weight.data.mul_(torch.tensor([[1.0], [7.0], [0.5], [3.0]]))
    after = route(router, 5 * x + 2)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-3)


def one_adapter(seed: int) -> nn.Module:
    """A tiny model with one trained-looking adapter beside every query and value map."""
    recipe = {"num_experts": 1, "router": Uniform, "experts": partial(lora, rank=2), "shared": frozen}
    model = sparsify(TINY["llama"](), Recipe(where=linears(r"q_proj|v_proj"), **recipe), verbose=False)
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, LoRA):
            nn.init.normal_(part.lora_A)
            nn.init.normal_(part.lora_B, std=0.3)
    return model


def test_a_gate_starts_at_half_the_strength_of_the_adapter_and_nothing_else_learns():
    model = one_adapter(0)
    batch = inputs(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learnt = [p.requires_grad for p in model.parameters()]
    routers = [part.router for part in model.modules() if isinstance(part, MoE)]
    seen = []
    watch = model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda m, a, y: seen.append((m, a[0], y)))
    gates = train_gates(model, [batch], steps=1)
    watch.remove()
    moe, u, y = seen[0]
    torch.testing.assert_close(y, moe.shared(u) + 0.5 * u @ moe.experts.delta(0).T)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == learnt
    assert [part.router for part in model.modules() if isinstance(part, MoE)] == routers
    assert all(vector.shape == (32,) and vector.any() for vector in gates.values())


def test_the_first_step_follows_the_gradient_of_the_sigmoid_at_half_strength():
    model = one_adapter(0)
    batch = inputs(model)
    gates = train_gates(model, [batch], steps=1, lr=1e-2)
    slow = one_adapter(0)
    layers = {name: part for name, part in slow.named_modules() if isinstance(part, MoE)}
    v = {name: torch.zeros(32, requires_grad=True) for name in layers}

    def gated(name):
        layer = layers[name]
        return lambda u: layer.shared(u) + (u @ v[name]).sigmoid().unsqueeze(-1) * (u @ layer.experts.delta(0).T)

    for name, layer in layers.items():
        layer.forward = gated(name)
    slow(**batch).loss.backward()
    for name, gate in gates.items():
        clear = v[name].grad.abs() > 1e-6  # AdamW's first step is the sign of the gradient
        assert clear.any()
        torch.testing.assert_close(gate[clear], -1e-2 * v[name].grad[clear].sign(), rtol=2e-2, atol=0)


def test_trained_gates_lower_the_loss_of_their_own_text():
    model = one_adapter(1)
    batch = inputs(model, batch=8)
    losses = []
    watch = model.register_forward_hook(lambda m, a, out: losses.append(out.loss.item()))
    train_gates(model, [batch], steps=40, lr=5e-2)
    watch.remove()
    assert losses[-1] < losses[0] - 0.05


def test_gates_are_files_beside_their_adapters_and_a_pool_grows_without_training(tmp_path):
    library = []
    for seed in range(3):
        model = one_adapter(seed)
        save_gates(train_gates(model, [inputs(model, seed=seed)], steps=2), tmp_path / str(seed))
        library.append(load_gates(tmp_path / str(seed)))
    for size in (2, 3):
        recipe = Recipe(
            where=linears(r"q_proj|v_proj"), num_experts=size, router=Phatgoose, experts=lora, shared=frozen
        )
        model = sparsify(TINY["llama"](), recipe, verbose=False)
        set_gates(model, library[:size])
        for name, part in model.named_modules():
            if isinstance(part, MoE):
                assert torch.equal(part.router.weight, torch.stack([gates[name] for gates in library[:size]]))


def test_gates_that_do_not_fit_are_refused_before_anything_changes():
    recipe = Recipe(where=linears(r"q_proj"), num_experts=2, router=Phatgoose, experts=lora, shared=frozen)
    model = sparsify(TINY["llama"](), recipe, verbose=False)
    whole = {f"model.layers.{i}.self_attn.q_proj": torch.ones(32) for i in range(2)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    last = "model.layers.1.self_attn.q_proj"
    for library, words in (
        ([whole], "1 gates for the 2 experts of"),
        ([whole, {name: v for name, v in whole.items() if name != last}], f"gate 1 has no vector for {last}"),
        ([whole, whole | {last: torch.ones(3)}], "where tokens are 32 wide"),
    ):
        with pytest.raises(ValueError, match=words):
            set_gates(model, library)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no Phatgoose router"):
        set_gates(TINY["llama"](), [whole])


def test_gates_are_trained_beside_one_adapter_alone(tmp_path):
    two = sparsify(
        TINY["llama"](), Recipe(where=linears("q_proj"), num_experts=2, experts=lora, shared=frozen), verbose=False
    )
    with pytest.raises(ValueError, match=r"q_proj has 2 experts, LoRA, .* load each adapter by itself"):
        train_gates(two, [{}])
    with pytest.raises(ValueError, match="has no sparse layer"):
        train_gates(nn.Linear(2, 2), [{}])
    with pytest.raises(ValueError, match="no batch"):
        train_gates(one_adapter(0), [])
    with pytest.raises(FileNotFoundError, match=r"gates\.safetensors does not exist; make it with train_gates"):
        load_gates(tmp_path)


def test_a_sigmoid_gate_of_zero_is_a_half():
    gate = TopK(D, 1, k=1, score=torch.sigmoid, normalize=False, init_std=0)
    assert route(gate, torch.randn(T, D)).weight.tolist() == [1 / (1 + exp(0))] * T
