"""CompeteSMoE v2 against its equations, token by token."""

from copy import deepcopy
from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moeify import Context, MoE, losses, record
from moeify.backends import compose
from moeify.experts import FFN, Each, Experts
from moeify.routers import Capacity, Compete, begin_step
from strategies import agree, doubled

D, E, K, T = 6, 5, 2, 7


def layer(competes=True, **options):
    moe = MoE(Compete(D, E, k=K, **options), FFN(E, D, 4))
    nn.init.normal_(moe.router.weight)
    nn.init.normal_(moe.experts.down_proj)
    moe.router.competes = competes
    return moe


def slow_output(p, e, x):
    gate, up = (p["experts.gate_up_proj"][e] @ x).chunk(2)
    return p["experts.down_proj"][e] @ (F.silu(gate) * up)


def slow_softmax(values):
    return [v.exp() / sum(w.exp() for w in values) for v in values]


def slow_token(p, x, competes):
    expert_outputs = [slow_output(p, e, x) for e in range(E)]
    if competes:
        affinity = [sum(F.softplus(o) for o in expert_output) / D for expert_output in expert_outputs]
    else:
        affinity = slow_softmax([p["router.weight"][e] @ x for e in range(E)])
    winners = sorted(range(E), key=lambda e: -affinity[e].item())[:K]
    total = sum(affinity[e] for e in winners)
    return sum(affinity[e] / total * expert_outputs[e] for e in winners), winners, affinity, expert_outputs


@pytest.mark.parametrize("competes", [True, False])
def test_the_layer_is_the_papers_loop_over_tokens(competes):
    moe, x = layer(competes), torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = torch.stack([slow_token(p, token, competes)[0] for token in x64])
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *p.values()])


@pytest.mark.parametrize("standardize", [False, True])
def test_distillation_draws_the_router_to_the_affinities_of_a_competition(standardize):
    moe, x = layer(), torch.randn(T, D)
    p = doubled(moe)
    slow = 0.0
    for token in x.double():
        _, winners, affinity, _ = slow_token(p, token, True)
        a = [w.detach() for w in affinity]
        if standardize:
            mean = sum(a) / E
            deviation = sqrt(sum((v - mean) ** 2 for v in a) / E)
            a = [(v - mean) / deviation for v in a]
        z = slow_softmax([p["router.weight"][e] @ token for e in range(E)])
        error = [(z[e] - target) ** 2 for e, target in enumerate(slow_softmax(a))]
        slow = slow + sum(error) / (T * E) + 0.2 * sum(error[e] for e in winners) / (T * K)
    fast = losses.distillation(moe.router(x, moe.context), standardize=standardize)
    agree(fast, list(moe.parameters()), slow, list(p.values()), atol=1e-7)


def test_diversity_is_the_mean_cosine_of_the_winners_answers_without_the_diagonal():
    moe, x = layer(), torch.randn(T, D)
    p = doubled(moe)
    slow = 0.0
    for token in x.double():
        _, winners, _, expert_outputs = slow_token(p, token, True)
        slow = slow + sum(
            expert_outputs[i] @ expert_outputs[j] / (expert_outputs[i].norm() * expert_outputs[j].norm()) / K**2
            for i in winners
            for j in winners
            if i != j
        )
    agree(losses.diversity(moe.router(x, moe.context)), list(moe.parameters()), slow / T, list(p.values()))


def test_without_a_competition_there_is_nothing_to_distil_or_to_tell_apart():
    moe = layer(competes=False)
    decision = moe.router(torch.randn(T, D), Context())
    assert losses.distillation(decision) == losses.diversity(decision) == 0


def test_the_winners_do_not_run_again():
    moe, rows = layer(), []
    moe.experts.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    moe(torch.randn(T, D))
    assert rows == [T * E]


@pytest.mark.parametrize("backend", ["precomputed", "gather", "compose"])
def test_every_backend_gives_the_answer_of_the_definition_to_a_competition(backend):
    moe, x = layer(), torch.randn(2, 4, D)
    moe.context.mask(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
    decision = moe.router(x, moe.context)
    slow = compose(x, replace(decision, expert_outputs=None), moe.experts)
    moe.backend = backend
    if backend == "gather":
        moe.context.mask(None)
        slow = compose(x, replace(moe.router(x, moe.context), expert_outputs=None), moe.experts)
    torch.testing.assert_close(moe(x), slow)


def test_answers_follow_their_rows_through_a_capacity_limit():
    moe, x = layer(), torch.randn(T, D)
    limited = MoE(Capacity(moe.router, factor=0.6), moe.experts)
    decision = limited.router(x, limited.context)
    assert len(decision.expert_outputs) == decision.counts.sum() < T * K
    torch.testing.assert_close(limited(x), compose(x, decision, moe.experts))


def test_evaluation_does_not_compete():
    moe = layer().eval()
    assert moe.router(torch.randn(T, D), Context()).evidence.affinity is None


def test_a_router_outside_of_a_layer_says_that_it_lacks_the_experts():
    router = Compete(D, E)
    router.competes = True
    with pytest.raises(ValueError, match="put it into a MoE"):
        router(torch.randn(T, D), Context())


def test_a_router_inside_another_is_given_the_experts_too():
    experts = FFN(E, D, 4)
    moe = MoE(Capacity(Compete(D, E), factor=2.0), experts)
    moe.router.router.competes = True
    assert moe.router.router._experts == (experts,)
    assert moe.router(torch.randn(T, D), moe.context).evidence.affinity.shape == (T, E)


def test_a_copy_of_a_layer_competes_with_its_own_experts_and_saves_them_once():
    moe = layer()
    twin = deepcopy(moe)
    assert twin.router._experts[0] is twin.experts
    assert set(moe.state_dict()) == {"router.weight", "experts.gate_up_proj", "experts.down_proj"}


def test_every_expert_answers_every_token():
    x = torch.randn(T, D)
    banks: list[Experts] = [FFN(E, D, 4), Each([nn.Linear(D, 3) for _ in range(E)])]
    for experts in banks:
        for e in range(E):
            counts = torch.zeros(E, dtype=torch.int64)
            counts[e] = T
            torch.testing.assert_close(experts.all_outputs(x)[:, e], experts(x, counts))


def test_layers_compete_at_their_rate_and_few_at_a_time():
    model = nn.Sequential(*(layer(competes=False, rate=0.25, most=2) for _ in range(6)))
    drawn = [_drawn(model, step) for step in range(400)]
    assert max(sum(step) for step in drawn) == 2
    share = torch.tensor(drawn, dtype=torch.float32).mean(0)  # E[min(2, Binomial(6, 1/4))] / 6 = 0.211
    assert (share - 0.211).abs().max() < 0.06


def _drawn(model, step, seed=0):
    begin_step(model, step, seed=seed)
    return [moe.router.competes for moe in model]


def test_who_competes_follows_from_seed_and_step_alone():
    model = nn.Sequential(*(layer(rate=0.5) for _ in range(6)))
    draws = [_drawn(model, step, seed) for seed in (0, 1) for step in (3, 4, 5)]
    torch.manual_seed(99)
    torch.rand(17)
    assert draws == [_drawn(model, step, seed) for seed in (0, 1) for step in (3, 4, 5)]
    assert len({tuple(draw) for draw in draws}) > 3


def test_a_recorded_competition_shows_who_won():
    model = nn.Sequential(layer())
    with record(model) as decisions:
        model(torch.randn(T, D))
    decision = decisions["0"]
    assert torch.equal(decision.choices.indices, decision.evidence.affinity.topk(K).indices)
