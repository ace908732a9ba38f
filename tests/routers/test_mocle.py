import pytest
import torch

from moeify import Context
from moeify.routers import Cluster

D, E = 8, 4


def decide(router, shape, mask=None, **inputs):
    context = Context()
    context.mask(mask)
    context.call.inputs |= {name: torch.as_tensor(value) for name, value in inputs.items()}
    return router(torch.randn(*shape, D), context)


def test_all_tokens_of_a_sample_go_to_the_same_two_experts_and_the_last_is_one_of_them():
    routing = decide(Cluster(D, E, clusters=9), (3, 5), cluster=[4, 8, 4])
    by_sample = routing.choices.indices.view(3, 5, 2)
    assert (by_sample == by_sample[:, :1]).all()
    assert (by_sample[..., 1] == E - 1).all()
    assert (by_sample[..., 0] < E - 1).all()
    assert torch.equal(by_sample[0], by_sample[2])
    torch.testing.assert_close(routing.choices.weights.sum(-1), torch.ones(15))
    assert routing.counts[-1] == 15


def test_every_sample_is_one_decision_with_noise_of_its_own():
    routing = decide(Cluster(D, E, clusters=9), (3, 5), cluster=[4, 4, 4])
    assert routing.logits.shape == routing.scores.shape == (3, E)
    assert routing.sequence_id.tolist() == [0, 1, 2]
    assert len({tuple(row) for row in routing.scores.tolist()}) == 3


def test_there_is_no_noise_in_evaluation():
    router = Cluster(D, E, clusters=9).eval()
    one, other = (decide(router, (2, 3), cluster=[1, 5]) for _ in range(2))
    assert torch.equal(one.choices.weights, other.choices.weights)


def test_samples_that_are_packed_into_one_sequence_keep_their_clusters():
    router = Cluster(D, E, clusters=9).eval()
    packed = decide(router, (1, 5), cluster=[[2, 2, 7, 7, 7]])
    alone = decide(router, (2, 2), cluster=[2, 7])
    assert len(packed.logits) == 2
    assert torch.equal(packed.choices.weights[[0, 2]], alone.choices.weights[[0, 2]])
    assert torch.equal(packed.choices.indices[[0, 2]], alone.choices.indices[[0, 2]])


def test_the_less_certain_a_decision_the_more_the_universal_expert_is_asked():
    torch.manual_seed(0)
    cold, warm = Cluster(D, E, clusters=9).eval(), Cluster(D, E, clusters=9, temperature=1.0).eval()
    warm.load_state_dict(cold.state_dict())
    clusters = list(range(9))
    asked = [decide(router, (9, 1), cluster=clusters).choices.weights[:, 1] for router in (cold, warm)]
    assert (asked[0] < asked[1]).all()


@pytest.mark.parametrize(("gate", "total"), [("once", 1.0), ("twice", None)])
def test_only_the_papers_gate_has_weights_that_sum_to_one(gate, total):
    router = Cluster(D, E, clusters=9, gate=gate, temperature=1.0)
    sums = decide(router, (4, 1), cluster=[0, 3, 5, 6]).choices.weights.sum(-1)
    assert router.weights_sum_to_one == (total is not None)
    assert torch.allclose(sums, torch.ones(4)) == router.weights_sum_to_one


def test_what_stands_in_the_padding_is_never_read():
    router, mask = Cluster(D, E, clusters=9).eval(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    padded = decide(router, (2, 3), mask, cluster=[[2, 2, 99], [7, 99, 99]])
    assert padded.source.sort().values.tolist() == [0, 0, 1, 1, 3, 3]
    assert torch.equal(padded.choices.weights, decide(router, (1, 3), cluster=[[2, 2, 7]]).choices.weights)


def test_what_cannot_be_routed_is_told():
    with pytest.raises(ValueError, match="'cluster' goes from 2 to 9, but the table has the clusters 0 to 8"):
        decide(Cluster(D, E, clusters=9), (2, 3), cluster=[2, 9])
    with pytest.raises(ValueError, match="looks up 'cluster', but the model was called without it"):
        decide(Cluster(D, E), (2, 3))
    with pytest.raises(ValueError, match="no cluster to look up"):
        Cluster(D, E, clusters=0)
    with pytest.raises(ValueError, match="at least two are needed"):
        Cluster(D, 1)
    with pytest.raises(ValueError, match="choose temperature > 0"):
        Cluster(D, E, temperature=0.0)
