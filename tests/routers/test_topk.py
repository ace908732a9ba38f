import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moeify.routers import ExpertGroups, Similarity, TopK, sigmoid, softmax, sqrt_softplus
from moeify.routers.base import k_best
from strategies import route, seeds, sharpen

# Ties


@given(st.sampled_from([1, 2, 9, 40]), st.integers(1, 70), st.data())  # sorted, or chosen one by one
def test_the_k_best_come_best_first_and_of_equals_the_first_first(tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    torch.manual_seed(data.draw(seeds))
    scores = torch.randint(-2, 3, (tokens, experts)).float().requires_grad_()
    best, indices = k_best(scores, k)
    slow = [sorted(range(experts), key=lambda j: -row[j])[:k] for row in scores.tolist()]
    assert indices.tolist() == slow
    assert torch.equal(best, scores.gather(1, torch.tensor(slow)))
    assert torch.equal(torch.autograd.grad(best.sum(), scores)[0].nonzero()[:, 1], indices.sort(1).values.flatten())


# Bad inputs


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_must_lie_between_one_and_the_number_of_experts(k):
    with pytest.raises(ValueError, match=f"k={k} experts per token out of 4 experts; choose 1 <= k <= 4"):
        TopK(8, 4, k=k)


@pytest.mark.parametrize("k", [1.5, "2"])
def test_k_is_a_whole_number(k):
    with pytest.raises(TypeError, match="experts per token is no whole number; choose 1 <= k <= 4"):
        TopK(8, 4, k=k)


def test_a_single_normalised_weight_is_refused_because_the_router_would_not_learn():
    with pytest.raises(ValueError, match="the router gets no gradient"):
        TopK(8, 4, k=1)
    TopK(8, 4, k=1, normalize=False)
    TopK(8, 1, k=1)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        (ExpertGroups(3, 1), "8 experts cannot be divided into 3 groups"),
        (ExpertGroups(4, 1), "1 groups of 2 experts leave fewer than k=3"),
        (ExpertGroups(4, 5), "a token cannot use 5 of 4 groups"),
        (ExpertGroups(0, 0), "a token cannot use 0 of 0 groups"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, reason):
    with pytest.raises(ValueError, match=reason):
        TopK(8, 8, k=3, expert_groups=groups)


# Laws


def test_one_token_is_routed():
    routing = route(TopK(8, 4), torch.randn(1, 8))
    assert routing.counts.sum() == 2


@given(st.integers(1, 6), st.data())
def test_k_different_experts_are_chosen_best_first(num_experts, data):
    k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(data.draw(seeds))
    router = TopK(8, num_experts, k=k, normalize=False)
    sharpen(router)
    routing = route(router, torch.randn(10, 8))
    assert all(len(set(row)) == k for row in routing.choices.indices.tolist())
    assert (routing.choices.weights.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("score", [softmax, sigmoid, sqrt_softplus])
@given(st.floats(0.1, 16), seeds)
def test_normalised_weights_sum_to_the_scale(score, scale, seed):
    torch.manual_seed(seed)
    router = TopK(8, 5, k=3, score=score, scale=scale)
    sharpen(router)
    sums = route(router, torch.randn(10, 8)).choices.weights.sum(-1)
    torch.testing.assert_close(sums, torch.full((10,), scale))


def test_only_normalised_weights_without_a_scale_preserve_a_function():
    assert TopK(8, 4).weights_sum_to_one
    assert not TopK(8, 4, normalize=False).weights_sum_to_one
    assert not TopK(8, 4, scale=2.5).weights_sum_to_one


def test_only_a_decision_per_token_is_causal():
    assert TopK(8, 4).causal
    assert not TopK(8, 4, per="sequence").causal


def test_a_later_token_does_not_move_an_earlier_decision():
    router = TopK(8, 4)
    sharpen(router)
    x = torch.randn(1, 5, 8)
    later = x.clone()
    later[:, 3:] = torch.randn(1, 2, 8)
    assert torch.equal(route(router, x).choices.indices[:3], route(router, later).choices.indices[:3])


# Precision


@pytest.fixture
def biased():
    router = TopK(8, 4, selection_bias=True)
    router.selection_bias.copy_(torch.tensor([1 / 3, 1e-4, 1.0001, -7.77]))
    return router


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        nn.Module.half,
        nn.Module.bfloat16,
        nn.Module.double,
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.bfloat16().float(),
        lambda m: nn.Sequential(m).bfloat16()[0],
        lambda m: copy.deepcopy(m.bfloat16()),
    ],
)
def test_a_selection_bias_is_never_rounded(move, biased):
    exact = biased.selection_bias.clone()
    moved = move(biased)
    assert moved.selection_bias.dtype == torch.float32
    assert torch.equal(moved.selection_bias, exact)
    assert "selection_bias" in moved.state_dict()


def test_the_weights_do_take_the_dtype_of_the_model(biased):
    assert biased.bfloat16().weight.dtype == torch.bfloat16


def test_a_selection_bias_stays_in_fp32_on_the_meta_device():
    with torch.device("meta"):
        router = TopK(8, 4, selection_bias=True)
    router = router.to(torch.bfloat16)
    assert router.selection_bias.is_meta
    assert router.selection_bias.dtype == torch.float32
    assert router.to_empty(device="cpu").selection_bias.dtype == torch.float32


def test_a_router_may_be_sent_to_the_meta_device(biased):
    moved = biased.to("meta", torch.bfloat16)
    assert moved.selection_bias.is_meta
    assert moved.selection_bias.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_computed_in_fp32_whatever_the_model_and_autocast(dtype):
    router = TopK(64, 4).to(dtype)
    x = torch.randn(5, 64, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = route(router, x).logits
    assert torch.equal(logits, nn.functional.linear(x.float(), router.weight.float()))


def test_the_projection_starts_small_and_its_bias_at_zero():
    router = TopK(512, 64, bias=True, init_std=0.006)
    assert router.weight.std().item() == pytest.approx(0.006, rel=0.05)
    assert router.bias.count_nonzero() == 0


def test_a_router_says_its_settings():
    assert "experts=4, k=2, score=softmax, normalize=True" in repr(TopK(8, 4))


@pytest.mark.parametrize("router", [TopK, Similarity])
def test_an_unknown_unit_of_decision_is_refused(router):
    with pytest.raises(ValueError, match="per='group' is not a unit of decision"):
        router(8, 4, per="group")
