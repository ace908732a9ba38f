"""Recorded decisions, given back."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeify import Context, MoE, record
from moeify.experts import FFN
from moeify.record import replay
from moeify.routers import Capacity, DefaultVector, Replay, Soft, TopK
from strategies import agree, layer, route, sharpen

D = 8


def network(router=TopK, **options):
    torch.manual_seed(0)
    return nn.Sequential(layer(router=router, **options), nn.LayerNorm(D), layer(router=router, **options))


@torch.no_grad()
def perturb(model):
    for moe in model:
        if isinstance(moe, MoE):
            for p in moe.router.parameters():
                p.add_(torch.randn_like(p))


@pytest.mark.parametrize("router", [TopK, Soft, DefaultVector, lambda *a, **o: Capacity(TopK(*a, **o), factor=0.6)])
def test_a_replay_repeats_the_output_to_the_bit_whatever_became_of_the_routers(router):
    model, x = network(router), torch.randn(2, 5, D)
    with record(model) as decisions:
        before = model(x)
    perturb(model)
    assert not torch.equal(model(x), before)
    with replay(model, decisions):
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)


def test_experts_that_a_router_had_asked_answer_anew_and_learn():
    model, x = network(DefaultVector), torch.randn(2, 5, D)
    with record(model) as decisions:
        before = model(x)
    with replay(model, decisions):
        model(x).sum().backward()
        assert all(p.grad.any() for moe in (model[0], model[2]) for p in moe.experts.parameters())
        with torch.no_grad():
            model[2].experts.down_proj.mul_(2)
    with replay(model, decisions):
        assert not torch.equal(model(x), before)


def test_several_forward_passes_are_replayed_in_their_order():
    model, batches, kept, before = network(), torch.randn(3, 2, 5, D), [], []
    for x in batches:
        with record(model) as decisions:
            before.append(model(x))
        kept.append(decisions)
    perturb(model)
    with replay(model, *kept):
        assert all(torch.equal(model(x), y) for x, y in zip(batches, before, strict=True))
        with pytest.raises(ValueError, match="all 3 recorded decisions have been replayed"):
            model(batches[0])


def test_recorded_weights_are_constants():
    model = network()
    with record(model) as decisions:
        model(torch.randn(2, 5, D))
    with replay(model, decisions):
        model(torch.randn(2, 5, D)).sum().backward()
    assert model[0].router.weight.grad is None
    assert model[0].experts.down_proj.grad.count_nonzero()


def test_recomputed_weights_are_the_scores_of_today_at_the_choices_of_then():
    moe, x = layer(k=2), torch.randn(6, D, requires_grad=True)
    decision = route(moe.router, x)
    perturb([moe])
    again = MoE(Replay(moe.router, [decision], weights="recomputed"), moe.experts)
    x64, weight = x.detach().double().requires_grad_(), moe.router.weight.detach().double().requires_grad_()
    experts = FFN(4, D, 6).double()
    experts.load_state_dict(moe.experts.state_dict())
    slow = torch.zeros(6, D, dtype=torch.float64)
    for t in range(6):
        chosen = decision.choices.indices[t].tolist()
        s = torch.exp(weight @ x64[t])
        for j in chosen:
            counts = torch.eye(4, dtype=torch.long)[j]
            slow[t] = slow[t] + s[j] / sum(s[i] for i in chosen) * experts(x64[t : t + 1], counts)[0]
    agree(again(x), [x, moe.router.weight], slow, [x64, weight])
    assert weight.grad is None


def test_recomputing_with_the_same_weights_changes_nothing_under_padding_and_scale():
    router = TopK(D, 4, normalize=False, scale=2.5)
    sharpen(router)
    x, context = torch.randn(3, 4, D), Context()
    context.mask(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]))
    before = router(x, context)
    after = Replay(router, [before], weights="recomputed")(x, context)
    assert torch.equal(before.weight, after.weight)
    after.weight[:, None].sum().backward()
    assert router.weight.grad.count_nonzero()


def test_a_pass_that_is_repeated_for_its_activations_gets_the_same_decision():
    model, batches = network(), torch.randn(2, 2, 5, D)
    with record(model) as decisions:
        model(batches[0])
    x, weight = batches[1].requires_grad_(), model[0].router.weight

    def gradient(run):
        with replay(model, decisions, weights="recomputed"):
            (g,) = torch.autograd.grad(run(x).square().sum(), weight)
        return g

    torch.testing.assert_close(
        gradient(model), gradient(lambda x: checkpoint(model, x, use_reentrant=False)), rtol=0, atol=0
    )


def test_the_routers_come_back_even_after_an_error():
    model = network()
    routers = [model[0].router, model[2].router]
    with record(model) as decisions:
        model(torch.randn(2, 5, D))
    message = r"for tokens of shape \(2, 5\), and the layer was given \(1, 5\)"
    with pytest.raises(ValueError, match=message), replay(model, decisions):
        model(torch.randn(1, 5, D))
    assert [model[0].router, model[2].router] == routers


def test_what_cannot_be_replayed_is_refused():
    model = network()
    with record(model) as decisions:
        model(torch.randn(2, 5, D))
    del decisions["2"]
    with pytest.raises(ValueError, match="no decision was recorded for 2"), replay(model, decisions):
        pass
    with pytest.raises(ValueError, match="no sparse layer of moeify"), replay(nn.Linear(2, 2), decisions):
        pass
    with pytest.raises(ValueError, match="only a TopK that decides token by token"):
        Replay(TopK(D, 4, per="sequence"), [], weights="recomputed")
