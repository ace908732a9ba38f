import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.routers import Sinkhorn
from moeify.routers.sinkhorn import plan
from strategies import route, seeds, sharpen


@given(st.integers(2, 40), st.integers(2, 8), st.floats(0, 5), seeds)
def test_rows_of_the_plan_sum_to_one_in_t_and_columns_to_one_in_e(tokens, num_experts, sharpness, seed):
    torch.manual_seed(seed)
    p = plan(sharpness * torch.randn(tokens, num_experts), 1e-5)
    torch.testing.assert_close(p.sum(0), torch.full((num_experts,), 1 / num_experts), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(p.sum(1), torch.full((tokens,), 1 / tokens), rtol=2e-2, atol=1e-4)


@given(seeds)
def test_what_is_added_to_a_token_or_to_an_expert_does_not_change_the_plan(seed):
    torch.manual_seed(seed)
    z = torch.randn(20, 4)
    shifted = z + 3 * torch.randn(20, 1) + 3 * torch.randn(4)
    torch.testing.assert_close(plan(z, 1e-6), plan(shifted, 1e-6), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("logits", [1000 * torch.eye(6)[:, :4], torch.tensor([[0.0, 500.0]] * 4 + [[-500.0, 0.0]])])
def test_the_iteration_ends_with_finite_numbers_however_large_the_logits(logits):
    assert plan(logits, 1e-4, iterations=50).isfinite().all()


def test_training_spreads_tokens_that_would_all_go_to_one_expert_and_evaluation_does_not():
    router = Sinkhorn(8, 4)
    sharpen(router)
    x = torch.randn(400, 8)
    x += 2 * router.weight[0].detach() / router.weight[0].norm()
    assert route(router.train(), x).counts.max() < 150
    assert route(router.eval(), x).counts[0] > 200


def test_no_gradient_flows_through_the_plan():
    router = Sinkhorn(8, 4)
    sharpen(router)
    x = torch.randn(20, 8)
    index = route(router, x).choices.indices
    loss = route(router, x).weight.sum()
    slow = torch.sigmoid(x @ router.weight.T).gather(1, index).sum()
    torch.testing.assert_close(*(torch.autograd.grad(v, router.weight)[0] for v in (loss, slow)))


@pytest.mark.parametrize("k", [0, 5])
def test_experts_that_are_not_there_are_refused(k):
    with pytest.raises(ValueError, match=f"k={k} experts per token out of 4"):
        Sinkhorn(8, 4, k=k)
