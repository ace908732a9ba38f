"""Product keys against the scores of all experts, one token at a time, in fp64, and PEER against its published code."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeify import Context, MoE
from moeify.experts import FFN, Each, Plain
from moeify.flops import count
from moeify.routers import ProductKeys
from strategies import agree, doubled

T, D, SIDE, H, K = 7, 6, 3, 2, 2
E = SIDE**2


def sharpened(router: ProductKeys) -> ProductKeys:
    nn.init.normal_(router.query)
    nn.init.normal_(router.keys)
    return router


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_head_uses_the_best_of_all_experts(k):
    moe = MoE(sharpened(ProductKeys(D, E, heads=H, k=k, dimensions=4)), Each([nn.Linear(D, 3) for _ in range(E)]))
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        y, queries = 0, (p["router.query"] @ token).view(2, H, 4)
        for h in range(H):
            keys = p["router.keys"][:, h]
            halves = [[queries[part, h] @ key for key in keys[part]] for part in (0, 1)]
            scores = {e: halves[0][e // SIDE] + halves[1][e % SIDE] for e in range(E)}
            chosen = sorted(scores, key=lambda e: -scores[e].item())[:k]
            total = sum(torch.exp(scores[e]) for e in chosen)
            for e in chosen:
                expert = p[f"experts.experts.{e}.weight"] @ token + p[f"experts.experts.{e}.bias"]
                y = y + torch.exp(scores[e]) / total * expert
        slow.append(y)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


class Largest(TorchDispatchMode):
    """Records the largest floating-point tensor that any operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        self.numbers = max(self.numbers, *found, 0)
        return out


@pytest.mark.parametrize("side", [32, 512])
def test_the_router_of_many_experts_grows_with_their_root(side):
    router = ProductKeys(D, side**2, heads=H, k=4, dimensions=5)
    assert sum(p.numel() for p in router.parameters()) == 2 * H * 5 * (D + side)
    with Largest() as seen, torch.no_grad():
        routing = router(torch.randn(50, D), Context())
    assert seen.numbers <= 2 * 50 * H * side
    assert routing.num_rows == 50 * H * 4
    assert routing.counts.shape == (side**2,)


def test_its_half_scores_are_counted():
    layer = MoE(ProductKeys(D, E, heads=H, k=K, dimensions=4), FFN(E, D, 1, activation=Plain(F.gelu)))
    assert count(layer).flops == 2 * (2 * H * 4 * D + 2 * H * SIDE * 4 + H * K * 2 * D)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_experts": 10}, "10 is none; choose 9 or 16"),
        ({"num_experts": 9, "k": 4}, "takes 4 of 3 half keys"),
        ({"num_experts": 9, "heads": 0}, "each of 0 heads"),
    ],
)
def test_what_product_keys_cannot_number_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        ProductKeys(D, **{"k": 2} | options)


def test_with_experts_of_one_unit_it_is_peer():
    peer = pytest.importorskip("PEER_pytorch")
    torch.manual_seed(0)
    theirs = peer.PEER(D, heads=H, num_experts=E, num_experts_per_head=K, dim_key=4, non_competing_scores=False)
    nn.init.normal_(theirs.keys)
    ours = MoE(ProductKeys(D, E, heads=H, k=K, dimensions=4), FFN(E, D, 1, activation=Plain(F.gelu)))
    layouts = [
        (ours.router.query, theirs.to_queries[0].weight, lambda w: w),
        (ours.router.keys, theirs.keys, lambda w: w.permute(2, 0, 1, 3)),
        (ours.experts.up_proj, theirs.weight_down_embed.weight, lambda w: w.unsqueeze(1)),
        (ours.experts.down_proj, theirs.weight_up_embed.weight, lambda w: w.unsqueeze(2)),
    ]
    with torch.no_grad():
        for mine, other, layout in layouts:
            mine.copy_(layout(other))
    results = []
    for module in (ours, theirs):
        x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for mine, other in [*zip(*results, strict=True), *((m.grad, layout(o.grad)) for m, o, layout in layouts)]:
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
