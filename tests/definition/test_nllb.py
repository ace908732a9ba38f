"""Final output masking and conditional MoE routing (NLLB), token by token; expert masks are in test_masked."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import Context, MoE, Recipe, losses, record, sparsify
from moeify.experts import Each
from moeify.flops import count
from moeify.routers import Capacity, Conditional, FinalMask, Residual, Router, TopK
from moeify.routers.nllb import conditional
from moeify.sparsify import copies
from strategies import agree, doubled, layer, route, sharpen
from tiny_models import causal_lm, inputs

T, D, E = 9, 6, 4


def maps(router: Router) -> MoE:
    """A layer whose experts are matrices."""
    moe = MoE(router, Each([nn.Linear(D, D, bias=False) for _ in range(E)]))
    sharpen(moe)
    return moe


def top2(scores, experts):
    return sorted(range(experts), key=lambda j: -scores[j].item())[:2]


@pytest.mark.parametrize("p", [0.3, 0.7])
def test_a_final_output_is_dropped_whole_or_scaled_up(p):
    moe, x = maps(FinalMask(TopK(D, E), p)), torch.randn(T, D, requires_grad=True)
    torch.manual_seed(3)
    fast = moe(x)
    torch.manual_seed(3)
    kept = (torch.rand(T) >= p).tolist()
    assert set(kept) == {True, False}
    x64, own = x.detach().double().requires_grad_(), doubled(moe)
    slow = []
    for token, keep in zip(x64, kept, strict=True):
        s = (own["router.router.weight"] @ token).softmax(-1)
        best = top2(s, E)
        y = sum(s[j] / sum(s[i] for i in best) * (own[f"experts.experts.{j}.weight"] @ token) for j in best)
        slow.append(y / (1 - p) if keep else 0 * token)
    agree(fast, [x, *moe.parameters()], torch.stack(slow), [x64, *own.values()])


def test_masked_tokens_cost_nothing_but_stay_assigned():
    router = FinalMask(TopK(D, E), 0.5)
    routing = route(router, torch.randn(200, D))
    assert routing.counts.sum() == len(routing.source) == 2 * len(routing.source.unique())
    assert routing.counts.sum() < routing.assigned.sum() == 400


def test_a_final_mask_changes_no_expectation_and_no_evaluation():
    router, x = FinalMask(TopK(D, E), 0.2), torch.randn(20_000, D)
    routing = route(router, x)
    total = torch.zeros(len(x)).index_add(0, routing.source, routing.weight)
    assert total.unique().round(decimals=4).unique().tolist() == [0, 1.25]
    assert total.mean().item() == pytest.approx(1, abs=0.02)
    moe = layer(D, E).eval()
    assert torch.equal(MoE(FinalMask(moe.router, 0.9), moe.experts).eval()(x[:7]), moe(x[:7]))


def test_padding_draws_no_mask():
    router, x, mask = FinalMask(TopK(D, E), 0.5), torch.randn(3, 5, D), torch.rand(3, 5) < 0.6
    found = []
    for given, of in ((x, mask), (x[mask], None)):
        torch.manual_seed(0)
        found.append(route(router, given, of))
    assert found[0].source.tolist() == mask.flatten().nonzero().squeeze(1)[found[1].source].tolist()


def gated(p: float) -> tuple[MoE, torch.Tensor, list[float]]:
    """A conditional layer, its tokens, and what dropout makes of their gates under seed 3."""
    moe = maps(Conditional(TopK(D, E - 1), D, p=p))
    nn.init.normal_(moe.router.bias)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(torch.ones(T), p).tolist()
    torch.manual_seed(3)
    return moe, torch.randn(T, D, generator=torch.Generator().manual_seed(0)), dropped


def sigmoid_gate(own, token):
    return 1 / (1 + torch.exp(-(own["router.weight"][0] @ token + own["router.bias"][0])))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_gate_weighs_the_sparse_experts_against_the_dense_one(p):
    moe, x, dropped = gated(p)
    x64, own = x.double().requires_grad_(), doubled(moe)
    slow = []
    for token, drop in zip(x64, dropped, strict=True):
        g = drop * sigmoid_gate(own, token)
        s = (own["router.router.weight"] @ token).softmax(-1)
        best = top2(s, E - 1)
        y = sum(s[j] / sum(s[i] for i in best) * (own[f"experts.experts.{j}.weight"] @ token) for j in best)
        slow.append((1 - g) * (own[f"experts.experts.{E - 1}.weight"] @ token) + g * y)
    x.requires_grad_()
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *own.values()])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_budget_is_how_far_the_mean_gate_is_from_its_share(p):
    moe, x, dropped = gated(p)
    spent, own = losses.budget(moe.router(x, moe.context), 0.8), doubled(moe)
    used = sum(drop * sigmoid_gate(own, token) for token, drop in zip(x.double(), dropped, strict=True)) / T
    gate = [own["router.weight"], own["router.bias"]]
    agree(spent, [moe.router.weight, moe.router.bias], (used - 0.8).abs(), gate)


def test_the_dense_expert_is_never_dropped_and_never_chosen():
    router = Conditional(Capacity(TopK(D, E - 1), factor=0.5), D)
    routing = route(router, torch.randn(30, D), torch.ones(30, dtype=torch.bool).view(5, 6))
    assert routing.counts[-1] == 30
    assert routing.counts[:-1].sum() < 60
    assert not routing.scores[:, -1].any()
    torch.testing.assert_close(losses.z(routing), routing.logits[:, :-1].logsumexp(-1).square().mean())


def test_a_budget_is_learnt():
    router, x = Conditional(TopK(D, E - 1), D), torch.randn(64, D)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        losses.budget(router(x, Context()), 0.8).backward()
        optimizer.step()
    assert losses.budget(router(x, Context()), 0.8) < 0.05


def test_copies_beside_their_dense_network_compute_what_it_did():
    model = causal_lm("llama").eval()
    before = model(**inputs(model)).logits
    recipe = Recipe(num_experts=E, router=partial(conditional, router=TopK), experts=copies)
    sparse = sparsify(model, recipe, verbose=False)
    torch.testing.assert_close(sparse(**inputs(model)).logits, before, rtol=1e-3, atol=1e-4)
    with record(sparse) as decisions:
        sparse(**inputs(model))
    routing = next(iter(decisions.values()))
    assert routing.counts.sum() == 3 * routing.tokens
    assert Conditional(TopK(D, 3), D).rows_per_token() == 3
    assert count(sparse).active_parameters < count(sparse).parameters


@pytest.mark.parametrize("around", [FinalMask, lambda router: Conditional(router, D)])
def test_what_is_put_around_them_keeps_the_link_of_a_stack(around):
    first, second = around(Residual(D, E)), around(Residual(D, E))
    context, x = Context(), torch.randn(T, D)
    first(x, context)
    linked = second.link_to(first)
    assert linked.router.residual is not None
    assert linked(x, context).counts.sum() > 0


@pytest.mark.parametrize("p", [-0.1, 1.0])
@pytest.mark.parametrize("around", [FinalMask, partial(Conditional, width=D)])
def test_what_drops_everything_is_refused(around, p):
    with pytest.raises(ValueError, match="choose 0 <= p < 1"):
        around(TopK(D, E), p=p)


def test_a_selection_bias_is_refused_where_every_token_goes_to_one_expert():
    with pytest.raises(ValueError, match=r"moved by the loads of all experts.*balance by a loss"):
        Conditional(TopK(D, E - 1, selection_bias=True), D)


def test_one_expert_cannot_be_dense_and_sparse():
    with pytest.raises(ValueError, match="at least two are needed"):
        conditional(D, 1)
