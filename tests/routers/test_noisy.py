import pytest
import torch
from torch import nn

from moeify import losses
from moeify.routers import Capacity, NoisyTopK
from strategies import route, sharpen


def test_there_is_no_noise_in_evaluation():
    router = NoisyTopK(8, 4).eval()
    sharpen(router)
    x = torch.randn(10, 8)
    torch.manual_seed(1)
    routing = route(router, x)
    assert torch.equal(route(router, x).weight, routing.weight)
    assert torch.equal(routing.choices.indices, (x @ router.weight.T).topk(2).indices)


def test_v_moes_weights_are_not_renormalised_and_shazeers_sum_to_one():
    x = torch.randn(50, 8)
    sums = {order: route(NoisyTopK(8, 4, order=order), x).choices.weights.sum(-1) for order in ("select", "softmax")}
    torch.testing.assert_close(sums["select"], torch.ones(50))
    assert (sums["softmax"] < 1).all()


def test_the_noise_is_as_wide_as_it_is_told():
    router = NoisyTopK(8, 4, noise=0.25, order="softmax")
    scores = route(router, torch.randn(20000, 8)).scores.log()  # the clean logits are zero
    assert (scores[:, 0] - scores[:, 1]).std().item() == pytest.approx(0.25 * 2**0.5, rel=0.03)


def test_the_load_loss_teaches_the_router_and_its_noise():
    router = NoisyTopK(8, 4, k=1, order="softmax")
    sharpen(router)
    losses.load_loss(route(router, torch.randn(20, 8))).backward()
    assert router.weight.grad.count_nonzero()
    assert router.noise_weight.grad.count_nonzero()


def test_the_expected_load_sums_to_about_the_rows_that_were_asked_for():
    router = NoisyTopK(8, 6, k=2)
    sharpen(router)
    routing = route(router, torch.randn(2000, 8))
    assert routing.evidence.expected_load.sum().item() == pytest.approx(4000, rel=0.02)


def test_without_noise_or_without_a_choice_there_is_no_expected_load():
    x = torch.randn(5, 8)
    assert route(NoisyTopK(8, 4).eval(), x).evidence.expected_load is None
    assert route(NoisyTopK(8, 4, k=4), x).evidence.expected_load is None


def test_a_capacity_keeps_the_expected_load():
    routing = route(Capacity(NoisyTopK(8, 4), factor=0.5), torch.randn(20, 8))
    assert routing.evidence.expected_load.sum() > routing.counts.sum()


def test_noise_that_has_died_out_gives_a_finite_gradient():
    router = NoisyTopK(1, 4)
    nn.init.normal_(router.weight)
    nn.init.constant_(router.noise_weight, -200.0)  # softplus(-200) = 0
    losses.load_loss(route(router, torch.ones(6, 1))).backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 5}, "k=5 experts per token out of 4"),
        ({"k": 1}, "k=1 with normalised weights"),
        ({"noise": 0.0}, "noise=0.0 is not a standard deviation"),
        ({"noise": -1.0}, "choose noise > 0, 'learned' or '1/E'"),
    ],
)
def test_what_no_noisy_router_can_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NoisyTopK(8, 4, **options)
