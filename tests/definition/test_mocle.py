"""MoCLE: one token at a time, in fp64, with dense W + s B A."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import LoRA
from moeify.routers import Cluster
from strategies import agree, doubled

B, N, D, OUT, E, C, S = 4, 3, 6, 5, 4, 7, 0.5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gate", ["once", "twice"])
@pytest.mark.parametrize("universal", [True, False])
def test_cluster_conditional_experts_are_the_papers_formula(universal, gate, training):
    options = {"temperature": 0.3, "noise": 0.2, "dimensions": 8, "bias": gate == "twice"}  # the authors' gate has one
    router = Cluster(D, E, clusters=C, universal=universal, gate=gate, **options)
    moe = MoE(router, LoRA(E, D, OUT, rank=2, scale=S), shared=nn.Linear(D, OUT)).train(training)
    nn.init.normal_(moe.experts.lora_B)
    cluster = torch.tensor([3, 0, 3, 6])
    moe.context.call.inputs["cluster"] = cluster
    x = torch.randn(B, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    torch.manual_seed(5)
    noise = torch.randn(B, E - universal) if training else torch.zeros(B, E - universal)

    def changed(j: int) -> torch.Tensor:
        return S * p["experts.lora_B"][j] @ p["experts.lora_A"][j]

    slow = []
    for b, c in enumerate(cluster):
        z = p["router.weight"] @ p["router.embedding.weight"][c] + p.get("router.bias", 0)
        gates = torch.softmax((z + 0.2 * noise[b]) / 0.3, -1)
        i, g = int(gates.argmax()), gates.max()
        change = (g if gate == "once" else g * g) * changed(i)
        if universal:
            change = change + (1 - g) * changed(E - 1)
        slow += [(p["shared.weight"] + change) @ token + p["shared.bias"] for token in x64[b]]
    torch.manual_seed(5)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow).view(B, N, OUT), [x64, *p.values()])
