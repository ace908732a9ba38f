"""Hash layers: the expert that the table has for a token's id, one token at a time, in fp64."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import Lookup
from strategies import agree, doubled, sharpen

B, N, D, E, V = 2, 5, 6, 4, 11


@pytest.mark.parametrize(("k", "learned"), [(1, False), (3, False), (2, True), (3, True)])
def test_a_lookup_is_its_table(k, learned):
    router = Lookup(D, E, size=V, k=k, learned=learned, scale=1.5)
    moe = MoE(router, Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    sharpen(moe)
    ids = torch.randint(V, (B, N))
    moe.context.call.inputs["input_ids"] = ids
    x = torch.randn(B, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token, key in zip(x64.flatten(0, 1), ids.flatten().tolist(), strict=True):
        experts = moe.router.table[key].tolist()
        s = {j: torch.sqrt(torch.log(1 + torch.exp(p["router.weight"][j] @ token))) if learned else 1 for j in experts}
        slow.append(1.5 * sum(s[j] / sum(s.values()) * (p[f"experts.experts.{j}.weight"] @ token) for j in experts))
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow).view(B, N, 3), [x64, *p.values()])
