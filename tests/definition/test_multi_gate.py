"""Several gates over the same experts, one token and one gate at a time."""

import pytest
import torch

from moeify import Context, MoE
from moeify.experts import Each
from moeify.losses import balance
from moeify.routers import MultiGate, SparseMultiGate
from strategies import agree, doubled, route

D, E, G, O = 6, 7, 3, 4  # noqa: E741


def bank():
    return Each([torch.nn.Linear(D, O) for _ in range(E)])


def slow_softmax(logits):
    e = [torch.exp(z - max(logits)) for z in logits]
    return [v / sum(e) for v in e]


def expert_outputs(parameters, token):
    return [
        parameters[f"experts.experts.{j}.weight"] @ token + parameters[f"experts.experts.{j}.bias"] for j in range(E)
    ]


@pytest.mark.parametrize("private", [0, 1, 2])
def test_every_gate_is_a_softmax_over_the_experts_it_sees(private):
    moe = MoE(MultiGate(D, E, gates=G, private=private), bank())
    x = torch.randn(5, D, requires_grad=True)
    x64, own = x.detach().double().requires_grad_(), doubled(moe)
    slow = torch.zeros(5, G, O, dtype=torch.float64)
    for t in range(5):
        f = expert_outputs(own, x64[t])
        for k in range(G):
            seen = [*range(k * private, (k + 1) * private), *range(G * private, E)]
            g = slow_softmax([own["router.weight"][k, j] @ x64[t] for j in seen])
            slow[t, k] = sum(weight * f[j] for weight, j in zip(g, seen, strict=True))
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *own.values()])


@pytest.mark.parametrize(("k", "union", "private"), [(2, 3, 0), (3, 5, 0), (2, 4, 1), (3, 7, 1)])
def test_gates_with_few_choices_share_a_bounded_union(k, union, private):
    moe = MoE(SparseMultiGate(D, E, gates=G, k=k, union=union, private=private), bank())
    x = torch.randn(9, D, requires_grad=True)
    x64, own = x.detach().double().requires_grad_(), doubled(moe)
    slow = torch.zeros(9, G, O, dtype=torch.float64)
    for t in range(9):
        f, g, picks = expert_outputs(own, x64[t]), [], []
        for gate in range(G):
            seen = [*range(gate * private, (gate + 1) * private), *range(G * private, E)]
            values = slow_softmax([own["router.weight"][gate, j] @ x64[t] for j in seen])
            g.append(dict(zip(seen, values, strict=True)))
            picks.append(sorted(seen, key=lambda j: -g[-1][j].item())[:k])
        worth = {j: sum(g[i][j].item() for i in range(G) if j in picks[i]) for pick in picks for j in pick}
        first = {pick[0] for pick in picks}
        kept = sorted(worth, key=lambda j: (j not in first, -worth[j]))[:union]
        for gate in range(G):
            mine = [j for j in picks[gate] if j in kept]
            slow[t, gate] = sum(g[gate][j] * f[j] for j in mine) / sum(g[gate][j] for j in mine)
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *own.values()])


def test_experts_run_once_for_all_gates():
    decision = route(MultiGate(D, E, gates=G), torch.randn(2, 5, D))
    assert decision.counts.tolist() == [10] * E
    assert decision.weight.shape == (10 * E, G)


def test_no_token_asks_more_experts_than_the_union_and_every_gate_has_one():
    decision = route(SparseMultiGate(D, E, gates=G, k=3, union=4), torch.randn(50, D))
    assert decision.source.bincount().max() <= 4
    asked = torch.zeros(50, G).index_add(0, decision.source, decision.weight)
    torch.testing.assert_close(asked, torch.ones(50, G))


def test_padding_reaches_no_gate():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    for router in (MultiGate(D, E, gates=G), SparseMultiGate(D, E, gates=G)):
        decision = route(router, torch.randn(2, 3, D), mask)
        assert set(decision.source.tolist()) == {0, 1, 3}
        assert len(decision.logits) == 3 * G


def test_every_decision_of_every_gate_is_balanced():
    decision = route(MultiGate(D, E, gates=G), torch.randn(4, D))
    assert decision.scores.shape == (4 * G, E)
    assert balance(decision).item() == pytest.approx(1)


def test_a_layer_of_several_gates_serves_a_batch_of_one():
    assert MoE(MultiGate(D, E, gates=G), bank())(torch.randn(1, D)).shape == (1, G, O)


def test_gates_start_apart_from_one_another():
    weight = MultiGate(D, E, gates=G).weight
    assert (weight[0] - weight[1]).abs().min() > 0


def test_gates_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 gates with 3 private experts each do not fit into 7"):
        MultiGate(D, E, gates=3, private=3)
    with pytest.raises(ValueError, match="too small for the first choice of each of 3 gates"):
        SparseMultiGate(D, E, gates=3, union=2)
    with pytest.raises(ValueError, match="the router gets no gradient"):
        SparseMultiGate(D, E, gates=3, k=1)
    with pytest.raises(ValueError, match="choose 1 <= k <= 5"):
        SparseMultiGate(D, E, gates=3, k=6, private=1)


def test_gates_survive_every_dtype():
    router = MultiGate(D, E, gates=G, private=1).to(torch.bfloat16)
    assert router(torch.randn(3, D, dtype=torch.bfloat16), Context()).weight.dtype == torch.float32
