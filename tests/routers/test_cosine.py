import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.routers import Cosine
from strategies import route, seeds


@given(st.floats(0.01, 100.0), seeds)
def test_the_length_of_a_token_does_not_matter(length, seed):
    torch.manual_seed(seed)
    router, x = Cosine(8, 6, k=2), torch.randn(10, 8)
    torch.testing.assert_close(route(router, length * x).scores, route(router, x).scores, rtol=1e-3, atol=1e-4)


def test_the_length_of_an_experts_embedding_does_not_matter():
    router, x = Cosine(8, 6, k=2), torch.randn(10, 8)
    before = route(router, x).logits
    router.embedding.data *= torch.rand(6, 1) + 0.5
    torch.testing.assert_close(route(router, x).logits, before)


def test_a_token_goes_to_the_expert_that_points_its_way():
    router = Cosine(3, 3, dimensions=3)
    router.projection.data = torch.eye(3)
    router.embedding.data = torch.eye(3)
    assert route(router, torch.tensor([[0.1, 5.0, 0.2], [2.0, 1.0, 0.0]])).choices.indices.flatten().tolist() == [1, 0]


def test_a_token_of_zeros_has_no_direction_and_a_finite_gradient():
    router, x = Cosine(8, 6), torch.zeros(2, 8, requires_grad=True)
    route(router, x).weight.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 7}, "k=7 experts"),
        ({"normalize": True}, "k=1 with normalised weights"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"dimensions": 0}, "dimensions=0"),
    ],
)
def test_what_no_cosine_router_can_be_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Cosine(8, 6, **options)
