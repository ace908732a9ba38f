"""Token choice against its formulas, one token and one expert at a time, in fp64."""

from math import inf

import pytest
import torch
from torch import nn

from moeify import Context, MoE
from moeify.experts import Each
from moeify.routers import ExpertGroups, TopK, sigmoid, softmax, sqrt_softplus
from strategies import agree, doubled, route, sharpen

B, N, D, E = 3, 5, 7, 8

SETTINGS = {
    "mixtral": {"k": 2},
    "switch": {"k": 1, "normalize": False},
    "olmoe": {"k": 3, "normalize": False},
    "all": {"k": E},
    "gpt-oss": {"k": 2, "select": "logit", "bias": True},
    "sigmoid": {"k": 2, "score": sigmoid},
    "deepseek-v2": {"k": 3, "expert_groups": ExpertGroups(4, 2), "normalize": False, "scale": 16.0},
    "deepseek-v3": {
        "k": 3,
        "score": sigmoid,
        "selection_bias": True,
        "expert_groups": ExpertGroups(4, 2, "top2"),
        "scale": 2.5,
    },
    "deepseek-v3, zero-filled": {
        "k": 3,
        "score": sigmoid,
        "expert_groups": ExpertGroups(4, 2, "top2", fill=0.0),
        "scale": 2.5,
    },
    "deepseek-v4": {"k": 2, "score": sqrt_softplus, "selection_bias": True, "scale": 1.5},
    "biased logits": {"k": 2, "select": "logit", "selection_bias": True},
    "mobile v-moe": {"k": 2, "per": "sequence"},
    "per group, biased": {
        "k": 3,
        "per": "sequence",
        "score": sigmoid,
        "selection_bias": True,
        "bias": True,
        "scale": 0.5,
    },
}


def slow_scores(z, score):
    if score is softmax:
        total = sum(torch.exp(z_j) for z_j in z)
        return [torch.exp(z_j) / total for z_j in z]
    if score is sigmoid:
        return [1 / (1 + torch.exp(-z_j)) for z_j in z]
    return [torch.sqrt(torch.log(1 + torch.exp(z_j))) for z_j in z]


def slow_groups(c, groups):
    size = len(c) // groups.count
    members = [range(g * size, (g + 1) * size) for g in range(groups.count)]
    best = 1 if groups.reduce == "max" else 2
    worth = [sum(sorted((c[j] for j in group), reverse=True)[:best]) for group in members]
    kept = sorted(range(groups.count), key=lambda g: -worth[g])[: groups.keep]
    return [c[j] if j // size in kept else groups.fill for j in range(len(c))]


def slow_choice(
    token, weight, bias, moved, *, k, score=softmax, select="score", expert_groups=None, normalize=True, scale=1
):
    z = [weight[j] @ token + (0 if bias is None else bias[j]) for j in range(len(weight))]
    s = slow_scores(z, score)
    c = [v.item() for v in (s if select == "score" else z)]
    if moved is not None:
        c = [c_j + b_j for c_j, b_j in zip(c, moved.tolist(), strict=True)]
    if expert_groups is not None:
        c = slow_groups(c, expert_groups)
    chosen = sorted(range(len(c)), key=lambda j: -c[j])[:k]
    total = sum(s[j] for j in chosen) if normalize else 1
    return {j: scale * s[j] / total for j in chosen}


@pytest.mark.parametrize("name", SETTINGS)
def test_token_choice_is_its_formula(name):
    options = SETTINGS[name]
    moe = MoE(TopK(D, E, **options), Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    sharpen(moe)
    router = moe.router
    if router.bias is not None:
        nn.init.normal_(router.bias)
    if router.selection_bias is not None:
        router.selection_bias.normal_(std=0.3)
    x = torch.randn(B, N, D, requires_grad=True)
    formula = {key: value for key, value in options.items() if key not in ("per", "bias", "selection_bias")}

    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    y = []
    for sequence in x64:
        for token in sequence:
            judged = sequence.mean(0) if options.get("per") == "sequence" else token
            gates = slow_choice(judged, p["router.weight"], p.get("router.bias"), router.selection_bias, **formula)
            y.append(sum(g * (p[f"experts.experts.{j}.weight"] @ token) for j, g in gates.items()))

    agree(moe(x), [x, *moe.parameters()], torch.stack(y).view(B, N, 3), [x64, *p.values()])


def test_a_bias_moves_choices_but_never_weights():
    router = TopK(D, E, k=2, score=sigmoid, selection_bias=True, normalize=False)
    sharpen(router)
    x = torch.randn(20, D)
    router.selection_bias[3] = 10.0
    routing = route(router, x)
    assert (routing.choices.indices == 3).any(-1).all()
    assert torch.equal(routing.choices.weights, routing.scores.gather(1, routing.choices.indices))
    assert routing.choices.weights.max() <= 1


def test_no_expert_outside_the_kept_groups_is_chosen():
    router = TopK(D, E, k=3, expert_groups=ExpertGroups(4, 2))
    sharpen(router)
    group = route(router, torch.randn(50, D)).choices.indices // 2
    assert max(len(set(row)) for row in group.tolist()) <= 2
    assert router.expert_groups.fill == -inf


def test_jitter_disturbs_the_router_in_training_and_never_the_experts():
    router = TopK(D, E, k=2, jitter=0.3)
    sharpen(router)
    x = torch.randn(4, D)
    before = x.clone()
    noisy = route(router, x)
    assert torch.equal(x, before)
    assert torch.equal(noisy.dispatch(x), x[noisy.source])
    assert not torch.equal(noisy.logits, x @ router.weight.T)
    torch.testing.assert_close(route(router.eval(), x).logits, x @ router.weight.T)


def test_jitter_is_uniform_around_one():
    router = TopK(1, 2, jitter=0.1)
    nn.init.ones_(router.weight)
    factors = route(router, torch.ones(5000, 1)).logits[:, 0]
    assert 0.9 <= factors.min() < 0.902
    assert 1.098 < factors.max() <= 1.1
    assert abs(factors.mean() - 1) < 0.005


def test_jitter_is_as_fine_in_bf16_as_in_fp32():
    router = TopK(1, 2, jitter=0.01)
    nn.init.ones_(router.weight)
    assert route(router, torch.ones(1000, 1, dtype=torch.bfloat16)).logits[:, 0].unique().numel() > 900


def test_a_group_decides_by_the_mean_of_its_real_tokens():
    router = TopK(D, E, k=2, per="sequence")
    sharpen(router)
    x = torch.randn(2, 4, D)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    routing = route(router, x, mask)
    means = torch.stack([x[0, :2].mean(0), x[1, 1:].mean(0)])
    torch.testing.assert_close(routing.logits, means @ router.weight.T)
    assert routing.source.sort().values.tolist() == [0, 0, 1, 1, 5, 5, 6, 6, 7, 7]


def test_a_context_may_lay_tokens_out_with_the_batch_last():
    router = TopK(D, E, k=2, per="sequence")
    sharpen(router)
    x = torch.randn(N, B, D)
    context = Context()
    context.call.batch_first = False
    assert torch.equal(router(x, context).logits, route(router, x.transpose(0, 1)).logits)
