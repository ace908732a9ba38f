import pytest
import torch

from moeify.routers import GShard
from strategies import route, sharpen


def test_every_token_has_its_first_expert_and_at_most_a_second():
    router = GShard(8, 6, threshold=1.0)
    sharpen(router)
    routing = route(router, torch.randn(100, 8))
    assert torch.equal(routing.source[routing.rank == 0].sort().values, torch.arange(100))
    assert set(routing.rank.tolist()) == {0, 1}
    assert 100 < len(routing.source) < 200


def test_the_first_expert_is_not_scaled_up_for_a_second_that_was_left_out():
    router = GShard(8, 6, threshold=1.0)
    sharpen(router)
    x = torch.randn(100, 8)
    both = route(router.eval(), x)
    routing = route(router.train(), x)
    first = routing.rank == 0
    weight = torch.zeros(100).scatter(0, routing.source[first], routing.weight[first])
    torch.testing.assert_close(weight, both.choices.weights[:, 0])


def test_evaluation_draws_only_when_told_to():
    x = torch.randn(50, 8)
    assert route(GShard(8, 6).eval(), x).counts.sum() == 100
    assert route(GShard(8, 6, threshold=5.0, eval_random=True).eval(), x).counts.sum() < 100


@pytest.mark.parametrize(
    ("num_experts", "threshold", "words"),
    [(1, 0.2, "k=2 experts per token out of 1"), (4, 0.0, "take TopK\\(k=2\\)"), (4, -1.0, "threshold=-1.0")],
)
def test_what_gshard_cannot_be_is_refused(num_experts, threshold, words):
    with pytest.raises(ValueError, match=words):
        GShard(8, num_experts, threshold=threshold)
