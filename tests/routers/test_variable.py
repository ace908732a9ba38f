import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moeify import MoE, losses
from moeify.experts import FFN
from moeify.routers import ReLU, Threshold, TopP
from moeify.routers.variable import nucleus
from strategies import route, seeds, sharpen

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
probabilities = st.floats(0, 1, exclude_min=True, allow_subnormal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@given(p=probabilities, max_k=st.integers(1, 7), sharpness=st.floats(0, 50), seed=seeds)
@example(p=1.0, max_k=7, sharpness=0.0, seed=0)
@example(p=1e-300, max_k=7, sharpness=50.0, seed=0)
def test_top_p_keeps_between_one_and_max_k_experts_for_every_p_and_dtype(dtype, p, max_k, sharpness, seed):
    torch.manual_seed(seed)
    kept = nucleus((sharpness * torch.randn(20, 7)).softmax(-1).to(dtype), p, max_k)
    assert kept.any(-1).all()
    assert kept.sum(-1).max() <= max_k


@given(p=st.floats(0.01, 0.99), seed=seeds)
def test_top_p_keeps_the_fewest_experts_that_exceed_p(p, seed):
    torch.manual_seed(seed)
    probability = torch.randn(20, 7, dtype=torch.float64).softmax(-1)
    kept = nucleus(probability, p, 7)
    inside = probability.masked_fill(~kept, 0)
    smallest = probability.masked_fill(~kept, 2).amin(-1)
    assert (inside.sum(-1) > p).all()
    assert (inside.sum(-1) - smallest <= p + 1e-12).all()
    assert (probability.masked_fill(kept, 0).amax(-1) <= smallest).all()


@given(st.floats(0.01, 0.98), seeds)
def test_more_probability_needs_no_fewer_experts(p, seed):
    torch.manual_seed(seed)
    probability = torch.randn(20, 7).softmax(-1)
    assert (nucleus(probability, p, 7) <= nucleus(probability, p + 0.01, 7)).all()


def test_top_p_of_one_is_the_dense_mixture():
    router = TopP(8, 5, p=1.0)
    assert route(router, torch.randn(6, 8)).counts.tolist() == [6] * 5


@given(st.floats(0, 0.99), seeds)
def test_a_threshold_keeps_the_best_expert_in_any_case_and_no_other_below_it(threshold, seed):
    torch.manual_seed(seed)
    router = Threshold(8, 5, threshold=threshold)
    sharpen(router)
    routing = route(router, torch.randn(10, 8))
    assert torch.equal(routing.source[routing.rank == 0].sort().values, torch.arange(10))
    assert (routing.weight[routing.rank > 0] > threshold).all()
    assert len(routing.source) >= (routing.scores > threshold).sum()


def test_a_layer_of_tokens_without_a_positive_gate_answers_nothing_and_has_finite_losses():
    moe = MoE(ReLU(4, 3), FFN(3, 4, 6))
    moe.router.weight.data.fill_(-1.0)
    x = torch.rand(5, 4, requires_grad=True)
    y, routing = moe(x), route(moe.router, x)
    assert routing.counts.sum() == 0
    assert y.count_nonzero() == 0
    loss = y.sum() + losses.balance(routing) + losses.l1(routing, 1.0)
    loss.backward()
    assert loss.item() == 0
    assert x.grad.isfinite().all()


def test_relu_gates_are_continuous_where_an_expert_comes_in():
    router = ReLU(1, 1)
    router.weight.data.fill_(1.0)
    assert route(router, torch.tensor([[-1e-6], [1e-6]])).weight.tolist() == pytest.approx([1e-6])


def test_the_l1_loss_makes_gates_small_and_sooner_those_of_busy_experts():
    router = ReLU(4, 3)
    router.weight.data = torch.tensor([[2.0] * 4, [1.0, -1.0, 1.0, -1.0], [-1.0] * 4])
    routing = route(router, torch.rand(200, 4))
    scores = routing.scores
    scores.retain_grad()
    losses.l1(routing, k=1.0).backward()
    busy, sometimes, never = scores.grad.mean(0).tolist()
    assert busy > sometimes > 0
    assert never == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TopP(8, 4, p=0.0), "p=0.0 is not a probability"),
        (lambda: TopP(8, 4, p=1.1), "choose 0 < p <= 1"),
        (lambda: TopP(8, 4, max_k=0), "max_k=0 experts out of 4"),
        (lambda: TopP(8, 4, max_k=5), "choose 1 <= max_k <= 4"),
        (lambda: Threshold(8, 4, threshold=1.0), "threshold=1.0 does not separate sigmoid scores"),
        (lambda: Threshold(8, 4, threshold=-0.1), "choose 0 <= threshold < 1"),
    ],
)
def test_what_keeps_no_expert_or_all_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
