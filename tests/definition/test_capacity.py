"""Capacity against a queue in front of every expert."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import Context, Evidence, assign, limit
from moeify.capacity import double, dropped, per_choice, per_choice_by_4, per_token
from moeify.routers import Capacity, Lookup, TopK
from strategies import agree, choices, route, sharpen


@pytest.mark.parametrize(("formula", "slots"), [(per_token, 80), (per_choice, 160), (double, 160)])
def test_capacity_formulas_give_the_published_figures(formula, slots):
    assert formula(1.25, 4096, 64, 2) == slots


def test_fairseq_serves_exactly_both_choices_at_factor_one():
    assert double(1.0, 4096, 64, 2) == 128
    assert double(1.0, 4096, 64, 1) == 128


def test_switch_gives_an_expert_at_least_four_slots():
    assert per_token(1.0, 8, 8, 1) == 4


def test_mesh_truncates_slots():
    assert per_token(1.25, 39, 8, 1) == 6
    assert per_token(1.25, 51, 8, 1) == 7


def test_an_infinite_capacity_drops_nothing():
    router = Capacity(TopK(4, 4), factor=0.5, eval_factor=math.inf).eval()
    torch.nn.init.zeros_(router.router.weight)
    assert route(router, torch.ones(32, 4)).counts.sum() == 64


def test_megatron_rounds_slots_up():
    assert per_choice(1.0, 10, 4, 1) == 3


def test_v_moe_rounds_slots_up_to_a_multiple_of_four():
    assert [per_choice_by_4(1.05, tokens, 8, 2) for tokens in (8, 16, 392)] == [4, 8, 104]
    assert per_choice_by_4(1.0, 4096, 64, 2) == 128


def slow_limit(index, gates, num_experts, slots, priority, overflow):
    """(T, E): the weight with which every token reaches every expert."""
    tokens, k = index.shape
    rows = [(t, c, int(index[t, c]), gates[t, c]) for t in range(tokens) for c in range(k)]
    turn = {
        "position": lambda row: row[0],
        "choice": lambda row: (row[1], row[0]),
        "batch": lambda row: (row[1], -gates[row[0]].max().item()),
        "score": lambda row: -row[3].item(),
    }[priority]
    queues = {e: sorted((row for row in rows if row[2] == e), key=turn)[:slots] for e in range(num_experts)}
    out = torch.zeros(tokens, num_experts, dtype=gates.dtype)
    for e, queue in queues.items():
        for t, _, _, gate in queue:
            out[t, e] = gate
    if overflow == "renormalize":
        before, after = gates.sum(-1, keepdim=True), out.sum(-1, keepdim=True)
        out = torch.where(after > 0, out * before / torch.where(after > 0, after, 1.0), out)
    return out


def weights(routing, num_experts):
    """(T, E): the weight with which every token reaches every expert."""
    tokens = math.prod(routing.shape)
    return torch.zeros(tokens, num_experts).index_put((routing.source, routing.expert), routing.weight)


@pytest.mark.parametrize("overflow", ["zero", "renormalize"])
@pytest.mark.parametrize("priority", ["position", "choice", "batch", "score"])
@given(choices(), st.integers(1, 5))
def test_a_limit_serves_the_front_of_every_queue(priority, overflow, choice, slots):
    index, gates, num_experts = choice
    limited = limit(assign(index, gates, num_experts), slots, priority=priority, overflow=overflow)
    gates64 = gates.detach().double().requires_grad_()
    slow = slow_limit(index, gates64, num_experts, slots, priority, overflow)
    agree(weights(limited, num_experts), [gates], slow, [gates64])
    assert limited.counts.tolist() == (slow > 0).sum(0).tolist()
    assert limited.assigned.tolist() == index.flatten().bincount(minlength=num_experts).tolist()


def slow_prefix(index, gates, num_experts, slots, length):
    """(T, E): a token is served while fewer of its sequence have been than its position has slots."""
    out = torch.zeros(len(index), num_experts, dtype=gates.dtype)
    for t in range(len(index)):
        first = t - t % length
        for c, e in enumerate(index[t].tolist()):
            if sum(int(e in row) for row in index[first:t].tolist()) < slots[t % length]:
                out[t, e] = gates[t, c]
    return out


@given(choices(max_tokens=12), st.integers(1, 4), st.integers(0, 2))
def test_a_limit_of_prefixes_gives_every_token_the_slots_of_its_position(choice, length, more):
    index, gates, num_experts = choice
    slots = [1 + n * more // 2 for n in range(length)]
    evidence = Evidence(sequence_id=torch.arange(len(index)) // length)
    limited = limit(assign(index, gates, num_experts, evidence=evidence), slots, per="prefix")
    gates64 = gates.detach().double().requires_grad_()
    slow = slow_prefix(index, gates64, num_experts, slots, length)
    agree(weights(limited, num_experts), [gates], slow, [gates64])


def test_a_prefix_is_served_as_it_is_alone():
    router, x = Capacity(TopK(4, 4), eval_factor=0.7, per="prefix").eval(), torch.randn(1, 20, 4)
    sharpen(router)
    whole = weights(route(router, x), 4)
    for n in range(1, 20):
        assert torch.equal(weights(route(router, x[:, :n]), 4), whole[:n])
    assert (whole == 0).sum() > 40
    with pytest.raises(ValueError, match="slots per prefix are given by position, not by 'choice'"):
        route(Capacity(TopK(4, 4), per="prefix", priority="choice"), x)


def slow_next(scores, k, slots, priority):
    """(T, E): tokens knock at their next best expert, round after round, as long as one has room."""
    tokens, experts = scores.shape
    best = [sorted(range(experts), key=lambda e, t=t: -scores[t, e].item()) for t in range(tokens)]
    total = [sum(scores[t, e] for e in best[t][:k]) for t in range(tokens)]
    turn = {
        "position": lambda row: (row[0], row[2]),
        "choice": lambda row: (row[1], row[2], row[0]),
        "batch": lambda row: (row[1], -(max(scores[row[0]]) / total[row[0]]).item(), row[2], row[0]),
        "score": lambda row: (-(scores[row[0], row[2]] / total[row[0]]).item(), row[2], row[0]),
    }[priority]
    rows = sorted([(t, c, best[t][c]) for t in range(tokens) for c in range(k)], key=turn)
    asks, served, tried = {row: row[2] for row in rows}, {}, [set(best[t][:k]) for t in range(tokens)]
    while asks:
        for row in [row for row in rows if row in asks]:
            if list(served.values()).count(asks[row]) < slots:
                served[row] = asks.pop(row)
        for row in [row for row in rows if row in asks]:
            del asks[row]
            if untried := [e for e in best[row[0]] if e not in tried[row[0]]]:
                asks[row] = untried[0]
                tried[row[0]].add(untried[0])
    out = torch.zeros(tokens, experts, dtype=scores.dtype)
    for (t, _, _), e in served.items():
        out[t, e] = scores[t, e] / total[t]
    return out


@pytest.mark.parametrize("priority", ["position", "choice", "batch", "score"])
@given(choices(), st.integers(1, 5))
def test_a_dropped_row_goes_to_the_next_best_expert_with_room(priority, choice, slots):
    index, _, num_experts = choice
    scores = torch.rand(len(index), num_experts).add(0.1).requires_grad_()
    index = scores.topk(index.shape[1]).indices
    gates = scores.gather(1, index) / scores.gather(1, index).sum(1, keepdim=True)
    limited = limit(
        assign(index, gates, num_experts, evidence=Evidence(scores=scores)), slots, priority=priority, overflow="next"
    )
    scores64 = scores.detach().double().requires_grad_()
    slow = slow_next(scores64, index.shape[1], slots, priority)
    agree(weights(limited, num_experts), [scores], slow, [scores64])
    assert limited.counts.tolist() == (slow > 0).sum(0).tolist()
    assert (limited.expert.diff() >= 0).all()


def test_no_token_is_left_behind_while_there_is_room():
    router = Capacity(TopK(4, 4, k=1, normalize=False), factor=1.0, overflow="next")
    limited = route(router, torch.ones(2, 8, 4))
    assert limited.counts.tolist() == [4, 4, 4, 4]
    assert dropped(limited) == (0, 0)
    assert not router.causal


def test_a_later_token_may_take_the_room_that_an_earlier_one_would_have_found():
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.6], [0.1, 0.7]])
    alone = assign(torch.tensor([[0], [0]]), scores[:2, :1], 2, evidence=Evidence(scores=scores[:2]))
    later = assign(
        torch.tensor([[0], [0], [1]]), torch.tensor([[0.9], [0.8], [0.7]]), 2, evidence=Evidence(scores=scores)
    )
    assert limit(alone, 1, overflow="next").source.tolist() == [0, 1]
    assert limit(later, 1, overflow="next").source.tolist() == [0, 2]


def test_padding_is_not_sent_to_the_next_expert():
    router = Capacity(TopK(4, 3, k=2), factor=0.8, overflow="next")
    sharpen(router)
    x, mask = torch.randn(2, 6, 4), torch.arange(12).view(2, 6) % 3 > 0
    padded, alone = route(router, x, mask), route(router, x[mask])
    assert torch.equal(padded.source, mask.flatten().nonzero().squeeze(1)[alone.source])
    assert torch.equal(padded.counts, alone.counts)


@pytest.mark.parametrize("router", [TopK(4, 2, k=1, normalize=False, per="sequence"), Lookup(4, 2)])
def test_who_does_not_score_every_token_cannot_send_it_on(router):
    context = Context()
    context.call.inputs["input_ids"] = torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs a router that scores all experts for every token"):
        Capacity(router, factor=0.5, overflow="next")(torch.randn(3, 5, 4), context)


def test_what_is_dropped_is_counted_in_rows_and_in_tokens():
    index = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]])
    routing = limit(assign(index, torch.rand(4, 2), 3), 1)
    assert dropped(routing) == pytest.approx((5 / 8, 2 / 4))
    assert dropped(assign(index, torch.rand(4, 2), 3)) == (0, 0)


def test_who_is_kept_is_said_by_the_priority():
    index = torch.tensor([[1, 0], [0, 1], [0, 1]])
    gates = torch.tensor([[0.9, 0.2], [0.5, 0.4], [0.8, 0.3]])
    first = {
        priority: limit(assign(index, gates, 2), 1, priority=priority).source[0].item()
        for priority in ("position", "choice", "score")
    }
    assert first == {"position": 0, "choice": 1, "score": 2}


def test_a_token_that_lost_every_row_gets_a_finite_gradient():
    gates = torch.rand(6, 2, requires_grad=True)
    index = torch.tensor([[0, 1]]).expand(6, 2)
    limited = limit(assign(index, gates, 2), 1, overflow="renormalize")
    limited.combine(torch.ones(2, 3)).sum().backward()
    assert gates.grad.isfinite().all()


def test_a_limit_below_one_slot_is_refused():
    with pytest.raises(ValueError, match="at least one slot"):
        limit(assign(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), 1), 0)


def test_a_limit_on_several_gates_is_refused():
    routing = assign(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1, 3), 1)
    with pytest.raises(ValueError, match="3 gates"):
        limit(routing, 1)


def test_training_and_evaluation_have_factors_of_their_own():
    router = Capacity(TopK(4, 4, k=2), factor=0.5, eval_factor=2.0)
    x = torch.ones(16, 4)
    assert route(router, x).counts.max() == 4
    assert route(router.eval(), x).counts.max() == 16


def test_padding_takes_no_slot_and_makes_none():
    router = Capacity(TopK(4, 2, k=1, normalize=False), factor=1.0)
    sharpen(router)
    x = torch.randn(1, 12, 4)
    mask = torch.arange(12).view(1, 12) >= 4
    assert torch.equal(route(router, x, mask).counts, route(router, x[mask]).counts)


@pytest.mark.parametrize("formula", [per_token, per_choice, per_choice_by_4, double])
def test_slots_count_tokens_also_where_a_group_decides_once(formula):
    router = Capacity(TopK(4, 2, k=1, normalize=False, per="sequence"), factor=1.0, capacity=formula)
    x = torch.ones(4, 8, 4)
    assert route(router, x).counts.max() == min(32, formula(1.0, 32, 2, 1))


def test_only_a_capacity_that_serves_by_position_is_causal():
    inner = TopK(4, 4)
    assert Capacity(inner).causal
    assert not Capacity(inner, priority="choice").causal
    assert not Capacity(inner, priority="score").causal
    assert not Capacity(TopK(4, 4, per="sequence")).causal


@pytest.mark.parametrize("priority", ["position", "choice", "batch", "score"])
def test_a_capacity_per_group_is_a_capacity_of_each_group_alone(priority):
    router = Capacity(TopK(4, 3), factor=0.7, priority=priority, per="sequence").eval()
    sharpen(router)
    x = torch.randn(2, 6, 4)
    together = weights(route(router, x), 3)
    alone = torch.cat([weights(route(router, sequence[None]), 3) for sequence in x])
    torch.testing.assert_close(together, alone)


def test_a_capacity_of_several_images_is_one_for_every_so_many():
    router = Capacity(TopK(4, 3), factor=0.7, capacity=per_choice_by_4, priority="choice", per=2)
    sharpen(router)
    x = torch.randn(5, 6, 4)
    decision, index = route(router, x), route(router.router, x).choices
    slow = torch.zeros(30, 3)
    for group in ([0, 1], [2, 3], [4]):
        tokens = [6 * image + n for image in group for n in range(6)]
        slots, used = 4 * math.ceil(math.ceil(0.7 * 2 * len(tokens) / 3) / 4), [0, 0, 0]
        for choice in range(2):
            for t in tokens:
                expert = int(index.indices[t, choice])
                if used[expert] < slots:
                    slow[t, expert] = index.weights[t, choice]
                    used[expert] += 1
    assert 0 < len(decision.source) < 60
    torch.testing.assert_close(weights(decision, 3), slow)


def test_a_group_of_one_image_is_an_image_and_a_group_of_all_the_batch():
    x = torch.randn(3, 6, 4)
    one, three, each, batch = (Capacity(TopK(4, 3), factor=0.7, per=per) for per in (1, 3, "sequence", "batch"))
    sharpen(one)
    for router in (three, each, batch):
        router.load_state_dict(one.state_dict())
    torch.testing.assert_close(weights(route(one, x), 3), weights(route(each, x), 3))
    torch.testing.assert_close(weights(route(three, x), 3), weights(route(batch, x), 3))


def test_a_capacity_per_group_leaves_padding_out_of_both_rows_and_slots():
    router = Capacity(TopK(4, 3), factor=0.5, eval_factor=0.5, per="sequence").eval()
    sharpen(router)
    x, mask = torch.randn(2, 6, 4), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]).bool()
    padded = weights(route(router, x, mask), 3)
    assert not padded[~mask.flatten()].any()
    torch.testing.assert_close(padded[:6], weights(route(router, x[:1]), 3))


def test_a_capacity_per_sequence_needs_sequences_and_does_not_look_for_room_elsewhere():
    routing = assign(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), 2)
    with pytest.raises(ValueError, match="knows the sequence of every token"):
        limit(routing, 1, per="sequence")
    with pytest.raises(ValueError, match="cannot be limited with per='sequence'"):
        limit(routing, 1, per="sequence", overflow="next")
    with pytest.raises(ValueError, match="a group of 0 sequences"):
        limit(routing, 1, per=0)
