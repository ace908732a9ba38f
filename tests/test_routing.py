from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import Evidence, Mixture, assign, limit
from moeify.backends import compose
from moeify.experts import Each
from moeify.routing import assign_where
from strategies import agree, assignments, choices, seeds

# Assignment


@given(assignments())
def test_combine_of_dispatched_ones_sums_each_tokens_weights(routing):
    y = routing.combine(routing.dispatch(torch.ones(*routing.shape, 2)))
    torch.testing.assert_close(y, routing.choices.weights.sum(-1, keepdim=True).expand(-1, 2))


@given(assignments())
def test_rows_are_sorted_by_expert_and_then_by_token(routing):
    place = routing.expert * len(routing.choices.indices) + routing.source
    assert torch.equal(place, place.sort().values)
    assert torch.equal(routing.counts, routing.choices.indices.flatten().bincount(minlength=len(routing.counts)))


@given(assignments())
def test_every_row_remembers_its_choice_and_its_weight(routing):
    assert torch.equal(routing.choices.indices[routing.source, routing.rank], routing.expert)
    assert torch.equal(routing.choices.weights[routing.source, routing.rank], routing.weight)


@given(assignments())
def test_an_expert_reads_the_tokens_of_its_rows(routing):
    pairs = set(zip(routing.source.tolist(), routing.expert.tolist(), strict=True))
    assert {tuple(pair) for pair in routing.reads().nonzero().tolist()} == pairs
    assert routing.num_rows == int(routing.counts.sum())


@given(choices(), st.integers(1, 3), seeds)
def test_an_assignment_is_its_sum(choice, gates_axis, seed):
    index, gates, num_experts = choice
    torch.manual_seed(seed)
    gates = torch.randn(*gates.shape, gates_axis, requires_grad=True)
    x = torch.randn(len(index), 3, requires_grad=True)
    x64, gates64 = (leaf.detach().double().requires_grad_() for leaf in (x, gates))
    experts = Each([torch.nn.Linear(3, 2) for _ in range(num_experts)])
    p = {name: p.detach().double() for name, p in experts.named_parameters()}
    slow = torch.stack([
        torch.stack([
            sum(
                gates64[t, c, g] * (p[f"experts.{e}.weight"] @ x64[t] + p[f"experts.{e}.bias"])
                for c, e in enumerate(index[t].tolist())
            )
            for g in range(gates_axis)
        ])
        for t in range(len(index))
    ])  # fmt: skip
    y = compose(x, assign(index, gates, num_experts), experts)
    assert y.shape == (len(index), gates_axis, 2)
    agree(y, [x, gates], slow, [x64, gates64])


def test_gates_become_an_axis_before_the_width_of_any_leading_shape():
    routing = assign(torch.zeros(6, 1, dtype=torch.int64), torch.rand(6, 1, 4), 1, shape=(2, 3))
    assert routing.combine(torch.randn(6, 5)).shape == (2, 3, 4, 5)


def test_tokens_that_were_left_out_read_nothing_and_get_nothing():
    routing = assign(torch.tensor([[1], [0]]), torch.ones(2, 1), 2, shape=(2, 2), positions=torch.tensor([0, 3]))
    x = torch.arange(4.0).view(2, 2, 1)
    assert routing.dispatch(x).flatten().tolist() == [3.0, 0.0]
    assert routing.combine(torch.ones(2, 1)).flatten().tolist() == [1.0, 0.0, 0.0, 1.0]


def test_answers_are_summed_in_fp32():
    k = 64
    routing = assign(torch.arange(k).view(1, k), torch.full((1, k), 1.0 / k), k)
    y = routing.combine(torch.full((k, 1), 1.0039, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.item() == torch.tensor(1.0039, dtype=torch.bfloat16).item()


@given(choices())
def test_a_table_of_who_uses_whom_is_the_decision_that_lists_it(choice):
    index, gates, num_experts = choice
    chosen = torch.zeros(len(index), num_experts, dtype=torch.bool).scatter(1, index, True)
    weight = torch.rand(len(index), num_experts).scatter(1, index, gates)
    listed, table = assign(index, gates, num_experts), assign_where(chosen, weight)
    assert torch.equal(table.source, listed.source)
    assert torch.equal(table.weight, listed.weight)
    assert torch.equal(table.counts, listed.counts)
    assert table.shape == listed.shape
    assert table.choices is None


@given(st.integers(1, 12), st.integers(1, 6), seeds)
def test_choices_of_a_table_are_numbered_from_the_largest_weight_on(tokens, num_experts, seed):
    torch.manual_seed(seed)
    chosen = torch.rand(tokens, num_experts) < 0.5
    weight = torch.randn(tokens, num_experts)
    routing = assign_where(chosen, weight)
    for token in range(tokens):
        rows = (routing.source == token).nonzero().flatten()
        by_choice = rows[routing.rank[rows].argsort()]
        assert routing.rank[by_choice].tolist() == list(range(int(chosen[token].sum())))
        assert torch.equal(routing.weight[by_choice], weight[token][chosen[token]].sort(descending=True).values)


def test_a_table_may_be_empty_and_leave_tokens_out():
    nobody = assign_where(torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3))
    assert nobody.combine(nobody.dispatch(torch.ones(2, 4))).count_nonzero() == 0
    chosen = torch.tensor([[False, True], [True, True]])
    routing = assign_where(chosen, torch.ones(2, 2), shape=(2, 2), positions=torch.tensor([1, 2]))
    assert routing.source.tolist() == [2, 1, 2]
    assert routing.combine(torch.ones(3, 1)).flatten().tolist() == [0.0, 1.0, 2.0, 0.0]


@given(assignments(), st.integers(1, 4))
def test_a_wide_limit_changes_nothing(routing, more):
    limited = limit(routing, int(routing.counts.max()) + more, priority="score")
    assert torch.equal(limited.source, routing.source)
    assert torch.equal(limited.weight, routing.weight)


# Mixture


def soft(x, slots, num_experts):
    """Soft MoE's decision (arXiv 2308.00951, eqs. 1-3) for random slot embeddings."""
    logits = x @ torch.randn(x.shape[-1], num_experts * slots).to(x)
    counts = torch.full((num_experts,), x.shape[:-2].numel() * slots)
    return Mixture(counts=counts, into=logits.softmax(-2), out_of=logits.softmax(-1))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_mixture_is_soft_moe(slots, batch):
    n, d, e = 5, 4, 3
    x = torch.randn(*batch, n, d, requires_grad=True)
    routing = soft(x.detach(), slots, e)
    into, out_of = (w.requires_grad_() for w in (routing.into, routing.out_of))
    experts = Each([torch.nn.Linear(d, 2) for _ in range(e)])

    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, into, out_of)]
    x64, into64, out_of64 = leaves
    mixed = torch.einsum("...ns,...nd->...sd", into64, x64)
    exact = deepcopy(experts).double().experts
    expert_outputs = torch.stack([exact[s // slots](mixed[..., s, :]) for s in range(e * slots)], dim=-2)
    slow = torch.einsum("...ns,...so->...no", out_of64, expert_outputs)
    agree(compose(x, routing, experts), [x, into, out_of], slow, leaves)
    assert routing.num_rows == len(routing.dispatch(x))
    assert routing.reads().shape == (x.shape[:-1].numel(), e)
    assert routing.reads().all()


def test_a_mixture_finds_its_tokens_where_they_lie():
    x, order = torch.randn(2, 5, 4), torch.randperm(10)
    routing = soft(x, 2, 3)
    y = routing.combine(routing.dispatch(x).tanh())
    scattered = torch.empty(10, 4)
    scattered[order] = x.flatten(0, 1)
    elsewhere = replace(routing, source=order.view(2, 5), shape=(10,))
    assert torch.equal(elsewhere.dispatch(scattered), routing.dispatch(x))
    assert torch.equal(elsewhere.combine(elsewhere.dispatch(scattered).tanh())[order], y.flatten(0, 1))


def test_a_mixture_of_ones_is_one():
    x = torch.randn(2, 5, 4)
    routing = soft(x, 2, 3)
    ones = torch.ones_like(x)
    torch.testing.assert_close(routing.combine(routing.dispatch(ones)), ones)


def test_a_mixture_is_averaged_in_fp32_under_autocast_too():
    x = torch.randn(2, 5, 4)
    routing = soft(x, 2, 3)
    rows = routing.dispatch(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = routing.dispatch(x), routing.combine(rows)
    assert torch.equal(mixed[0], rows)
    assert torch.equal(mixed[1], routing.combine(rows))


@given(choices(), st.data())
def test_rows_that_are_left_out_change_neither_the_load_before_nor_what_was_chosen(choice, data):
    whole = assign(*choice)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(whole.source), max_size=len(whole.source))))
    kept = kept.bool()
    for part in (whole.only(kept), whole.only(kept.nonzero().squeeze(1))):
        assert torch.equal(part.expert, whole.expert[kept])
        assert torch.equal(part.source, whole.source[kept])
        assert torch.equal(part.rank, whole.rank[kept])
        assert torch.equal(part.assigned, whole.counts)
        assert part.choices is whole.choices
        assert part.is_limited


def test_only_a_limit_makes_a_decision_limited():
    whole = assign(torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2, requires_grad=True), 2)
    assert not whole.is_limited
    assert not whole.detached().is_limited
    assert whole.has_all_rows
    assert not whole.only(torch.tensor([True, True, True, False])).has_all_rows


def test_a_detached_decision_has_no_graph_anywhere():
    logits = torch.rand(2, 2, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 0]])
    routing = assign(index, logits.softmax(-1), 2, evidence=Evidence(logits=logits, scores=logits.softmax(-1)))
    plain = routing.detached()
    for tensor in (plain.weight, plain.choices.weights, plain.logits, plain.scores):
        assert not tensor.requires_grad
    assert torch.equal(plain.weight, routing.weight)
