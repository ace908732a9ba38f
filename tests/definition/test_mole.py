"""MoLE against its equations: the gate reads what the experts say."""

from math import log

import pytest
import torch
from torch import nn

from moeify import Context, MoE, losses
from moeify.experts import LoRA
from moeify.routers import MoLE, TopK
from strategies import agree, doubled, route

D, OUT, E, T, TAU = 6, 5, 3, 9, 0.6


def layer() -> MoE:
    moe = MoE(MoLE(D, E, temperature=TAU, init_std=1.0), LoRA(E, D, OUT, rank=3, scale=0.5), nn.Linear(D, OUT))
    nn.init.normal_(moe.experts.lora_B)
    return moe


def slow_gates(p, u):
    expert_outputs = [0.5 * p["experts.lora_B"][j] @ (p["experts.lora_A"][j] @ u) for j in range(E)]
    flat = [value for expert_output in expert_outputs for value in expert_output]
    mean = sum(flat) / (E * OUT)
    deviation = (sum((value - mean) ** 2 for value in flat) / (E * OUT) + 1e-5).sqrt()
    seen = [(value - mean) / deviation for value in flat]
    tau = p["router.log_temperature"][0].exp()
    z = [sum(w * a for w, a in zip(p["router.weight"][j], seen, strict=True)) / tau for j in range(E)]
    return expert_outputs, [each.exp() / sum(other.exp() for other in z) for each in z]


def test_the_layer_is_the_papers_loop_over_tokens():
    moe, x = layer(), torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for u in x64:
        expert_outputs, gates = slow_gates(p, u)
        y = p["shared.weight"] @ u + p["shared.bias"]
        slow.append(y + sum(g * expert_output for g, expert_output in zip(gates, expert_outputs, strict=True)))
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def test_the_experts_do_not_run_twice():
    moe, rows = layer(), []
    moe.experts.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    moe(torch.randn(T, D))
    assert rows == [T * E]


def test_the_balance_loss_is_the_product_of_the_mean_gates():
    moe, x = layer(), torch.randn(T, D)
    p = doubled(moe)
    gates = [slow_gates(p, u)[1] for u in x.double()]
    product = 1.0
    for j in range(E):
        product = product * sum(each[j] for each in gates) / T
    fast = losses.log_product(moe.router(x, moe.context))
    agree(fast, list(moe.parameters()), -product.log(), list(p.values()))


def test_the_balance_loss_is_least_where_all_experts_weigh_alike():
    router = TopK(D, E, init_std=0)
    assert losses.log_product(route(router, torch.randn(T, D))).item() == pytest.approx(E * log(E))
    nn.init.normal_(router.weight, std=3)
    assert losses.log_product(route(router, torch.randn(T, D))) > E * log(E)


def test_a_step_down_the_balance_loss_evens_the_gates():
    router, x = TopK(D, E, bias=True), torch.randn(200, D)
    router.bias.data.copy_(torch.tensor([3.0, 0.0, -3.0]))
    before = losses.log_product(route(router, x))
    before.backward()
    router.bias.data -= 0.3 * router.bias.grad
    assert losses.log_product(route(router, x)) < before - 0.1


def test_a_gate_is_as_wide_as_all_answers_and_needs_its_experts():
    moe = layer()
    assert moe.router.weight.shape == (E, E * OUT)
    kept = moe.router.weight
    assert MoE(moe.router, moe.experts).router.weight is kept
    with pytest.raises(ValueError, match="put it into a MoE"):
        MoLE(D, E)(torch.randn(T, D), Context())
    with pytest.raises(ValueError, match="temperature=0 divides"):
        MoLE(D, E, temperature=0)
