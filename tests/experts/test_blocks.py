import torch
from torch import nn

from moeify import MoE
from moeify.experts import FFN, Blocks, Each, Identity, Scaled, Zero
from moeify.routers import TopK
from strategies import route, sharpen


def test_banks_number_their_experts_one_after_another():
    assert Blocks([FFN(3, 4, 2), Identity(2), Zero()]).num_experts == 6


def test_blocks_of_single_experts_are_the_stack():
    stack = FFN(3, 4, 5)
    singles = [FFN(1, 4, 5) for _ in range(3)]
    for e, single in enumerate(singles):
        for p, q in zip(stack.parameters(), single.parameters(), strict=True):
            q.data.copy_(p.data[e : e + 1])
    rows, counts = torch.randn(7, 4), torch.tensor([3, 0, 4])
    torch.testing.assert_close(Blocks(singles)(rows, counts), stack(rows, counts))


def test_blocks_may_hold_blocks():
    inner = Blocks([Identity(), Zero()])
    y = Blocks([inner, Identity()])(torch.ones(3, 2), torch.tensor([1, 1, 1]))
    assert y[:, 0].tolist() == [1.0, 0.0, 1.0]


def test_scaled_experts_read_their_rows_times_a_number():
    rows, counts = torch.randn(3, 2), torch.tensor([1, 1, 1])
    blocks = Blocks([FFN(1, 2, 4), Identity(), Zero()])
    assert torch.equal(Scaled(blocks, 2.0)(rows, counts), blocks(2 * rows, counts))
    assert torch.equal(Scaled(blocks, 2.0).costs, blocks.costs)


def test_a_zero_expert_leaves_the_rest_of_the_weight_to_the_others():
    router = TopK(4, 2)
    sharpen(router)
    x = torch.randn(5, 4)
    gates = route(router, x).scores
    torch.testing.assert_close(MoE(router, Blocks([Identity(), Zero()]))(x), gates[:, :1] * x)


def test_each_may_hold_modules_of_any_kind_and_their_gradients_differ():
    experts = Each([nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.ReLU()), nn.Identity()])
    rows = torch.randn(6, 4, requires_grad=True)
    experts(rows, torch.tensor([2, 3, 1])).sum().backward()
    assert torch.equal(rows.grad[5], torch.ones(4))
    assert experts.num_experts == 3
