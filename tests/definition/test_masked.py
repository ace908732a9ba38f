"""Expert output masking against its definition, row by row."""

import pytest
import torch

from moeify import MoE
from moeify.experts import FFN, Blocks, Identity, Masked
from moeify.routers import TopK
from strategies import agree, layer, route

E, D = 4, 5
COUNTS = torch.tensor([3, 0, 1, 2])


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_an_answer_is_dropped_whole_or_scaled_up(p):
    inner = FFN(E, D, 6)
    rows = torch.randn(6, D, requires_grad=True)
    torch.manual_seed(3)
    fast = Masked(inner, p)(rows, COUNTS)
    torch.manual_seed(3)
    draws = torch.rand(6, 1)
    rows64 = rows.detach().double().requires_grad_()
    twin = FFN(E, D, 6).double()
    twin.load_state_dict(inner.state_dict())
    expert_outputs = twin(rows64, COUNTS)
    slow = [
        expert_output / (1 - p) if draw >= p else 0 * expert_output
        for expert_output, draw in zip(expert_outputs, draws, strict=True)
    ]
    agree(fast, [rows, *inner.parameters()], torch.stack(slow), [rows64, *twin.parameters()])


def test_masking_changes_no_expectation():
    rows, counts = torch.ones(20_000, 1), torch.tensor([20_000])
    expert_outputs = Masked(Identity(), 0.2)(rows, counts)
    assert expert_outputs.unique().tolist() == [0, 1.25]
    assert expert_outputs.mean() == pytest.approx(1, abs=0.02)


def test_evaluation_masks_nothing():
    moe = layer(D, E).eval()
    x = torch.randn(7, D)
    assert torch.equal(MoE(moe.router, Masked(moe.experts, 0.9)).eval()(x), moe(x))


def test_a_token_may_lose_one_expert_and_keep_another():
    routing = route(TopK(D, E), torch.randn(200, D))
    kept = Masked(Identity(E), 0.5)(torch.ones(400, 1), routing.counts)
    per_token = torch.zeros(200, 1).index_add(0, routing.source, (kept > 0).float())
    assert set(per_token.flatten().tolist()) == {0, 1, 2}


def test_masked_experts_cost_what_they_cost():
    assert Masked(Blocks([FFN(1, D, 6), Identity()])).costs.tolist() == [1, 0]


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_mask_that_leaves_nothing_is_refused(p):
    with pytest.raises(ValueError, match="choose 0 <= p < 1"):
        Masked(Identity(), p)
