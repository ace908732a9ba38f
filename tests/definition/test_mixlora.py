"""MixLoRA: one token at a time, in fp64, every expert a dense network with W + s B A in the place of W."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from moeify import MoE, Recipe, losses, sparsify
from moeify.experts import LoRA, LoRAFFN
from moeify.find import linears
from moeify.kernels.stacked import SWIGLU
from moeify.routers import TopK
from moeify.sparsify import lora, recipes
from moeify.sparsify.shared import frozen
from moeify.store import load_weights, save
from plain_models import sparse_layers
from strategies import agree, doubled, sharpen
from tiny_models import causal_lm, inputs

T, D, H, E, S = 9, 6, 4, 5, 2.0


def layer() -> MoE:
    changes = LoRA(E, D, 2 * H, rank=2, scale=S), LoRA(E, H, D, rank=2, scale=S)
    moe = MoE(TopK(D, E, k=2), LoRAFFN(nn.Linear(D, 2 * H, bias=False), nn.Linear(H, D, bias=False), SWIGLU, *changes))
    sharpen(moe)
    for change in changes:
        nn.init.normal_(change.lora_B)
    return moe


def test_mixlora_is_the_papers_formula():
    moe = layer()
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()

    def changed(name: str, j: int) -> torch.Tensor:
        a, b = (p[f"experts.{name}_lora.lora_{side}"][j] for side in "AB")
        return p[f"experts.{name}.weight"] + S * b @ a

    slow = []
    for token in x64:
        r = torch.softmax(p["router.weight"] @ token, -1)
        first, second = r.topk(2).indices.tolist()
        expert_output = torch.zeros(D, dtype=torch.float64)
        for j in (first, second):
            gate, up = (changed("up", j) @ token).split(H)
            expert_output = expert_output + r[j] / (r[first] + r[second]) * changed("down", j) @ (F.silu(gate) * up)
        slow.append(expert_output)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def test_its_balance_loss_is_experts_times_the_sum_of_shares_times_probabilities():
    moe = layer()
    x = torch.randn(T, D)
    weight = moe.router.weight.detach().double().requires_grad_()
    r = [torch.softmax(weight @ token, -1) for token in x.double()]
    f, p = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for scores in r:
        for j in scores.topk(2).indices.tolist():
            f[j] += 1 / (2 * T)
        p = p + scores / T
    slow = E * sum(f[j] * p[j] for j in range(E))
    agree(losses.balance(moe.router(x, moe.context)), [moe.router.weight], slow, [weight])


ATTENTION = Recipe(
    where=linears("self_attn"),
    num_experts=1,
    router=partial(TopK, k=1),
    experts=partial(lora, rank=4, scale=2.0),
    shared=frozen,
)


def both() -> nn.Module:
    return sparsify(sparsify(causal_lm("llama"), recipes["mixlora"], verbose=False), ATTENTION, verbose=False)


def test_adapters_of_the_attention_are_a_second_recipe_and_start_as_nothing(tmp_path):
    dense, model = causal_lm("llama").eval(), both().eval()
    torch.testing.assert_close(model(**inputs(model)).logits, dense(**inputs(dense)).logits)
    layers = sparse_layers(model)
    assert len(layers) == 2 * (1 + 4)
    for name, module in layers.items():
        if "self_attn" in name:
            nn.init.normal_(module.experts.lora_B)
            x = torch.randn(2, 3, module.shared.in_features)
            change = module.shared.weight + module.experts.delta(0)
            torch.testing.assert_close(module(x), F.linear(x, change), rtol=1e-4, atol=1e-5)
    save(model, tmp_path)
    again = both().eval()
    load_weights(again, tmp_path)
    torch.testing.assert_close(again(**inputs(model)).logits, model(**inputs(model)).logits)
