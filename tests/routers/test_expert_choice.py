from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.routers import ExpertChoice
from strategies import masks, route, seeds, sharpen


@pytest.mark.parametrize("per", ["sequence", "batch"])
@given(factor=st.floats(0.1, 4), mask=masks(), seed=seeds)
def test_every_expert_takes_equally_many_tokens(per, factor, mask, seed):
    torch.manual_seed(seed)
    router = ExpertChoice(8, 4, factor=factor, per=per)
    sharpen(router)
    routing = route(router, torch.randn(*mask.shape, 8), mask)
    groups = mask.sum(1) if per == "sequence" else mask.sum().view(1)
    assert routing.counts.tolist() == [sum(ceil(factor * n / 4) for n in groups.tolist())] * 4


def test_every_expert_takes_the_tokens_that_it_scores_highest():
    router = ExpertChoice(8, 4, factor=1.0)
    sharpen(router)
    routing = route(router, torch.randn(1, 20, 8))
    for expert, tokens in enumerate(routing.source.split(routing.counts.tolist())):
        others = torch.ones(20, dtype=torch.bool).scatter(0, tokens, False)
        assert routing.scores[tokens, expert].min() > routing.scores[others, expert].max()


def test_a_token_may_be_taken_by_no_expert_and_by_all():
    router = ExpertChoice(1, 2, factor=1.0)
    router.weight.data = torch.tensor([[1.0], [-1.0]])
    routing = route(router, torch.tensor([[[5.0], [5.1], [-5.0], [-5.1]]]))
    assert routing.counts.tolist() == [2, 2]
    everywhere = ExpertChoice(8, 4, factor=4.0)
    assert route(everywhere, torch.randn(1, 6, 8)).counts.tolist() == [6] * 4
    router.weight.data.zero_()
    assert route(router, torch.randn(1, 6, 1)).source.unique().numel() == 3  # ties: both take the same


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": 0.0}, "factor=0.0 experts per token out of 4"),
        ({"factor": 4.5}, "choose 0 < factor <= E"),
        ({"per": "token"}, "not per 'token'"),
    ],
)
def test_what_experts_cannot_choose_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ExpertChoice(8, 4, **options)
