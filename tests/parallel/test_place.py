"""Placements hold every expert, keep all rows, and equal those of EPLB; rebalancing moves experts where it pays."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.data.claim_files import data_file
from moeify.inspect.formats import read_trace
from moeify.parallel import (
    DEVICES,
    TARGETS,
    Cluster,
    Layout,
    Link,
    ModelShape,
    Placed,
    Placement,
    Rebalancer,
    Step,
    Workload,
    permuted,
    replicated,
    shadowed,
    simulate,
)

E, LAYERS = 32, 4
counted = st.lists(st.integers(0, 500), min_size=E, max_size=E).map(lambda c: torch.tensor([c, c[::-1]]).double())


def step(experts=E, layers=LAYERS, nodes=1, inter=45e9):
    shape = ModelShape(
        name="sparse", width=2048, blocks=layers, sparse_layers=layers, num_experts=experts, k=8.0, hidden=768.0,
        dense_parameters=9e8, embedding=6e8, dense_flops=1.8e9, head_flops=6e8, attention_flops=8e5, vocabulary=0,
    )  # fmt: skip
    cluster = Cluster(nodes=nodes, devices_per_node=8, device=DEVICES["h100"],
                      intra=Link(bandwidth=350e9, latency=1e-5), inter=Link(bandwidth=inter, latency=2e-5))  # fmt: skip
    return Step(shape=shape, cluster=cluster, workload=Workload.balanced(experts), length=4096,
                target=TARGETS["megatron"])  # fmt: skip


def replay(counts, spare=0, *, shadows=0, ep=8, nodes=1):
    priced, layout = step(counts.shape[2], counts.shape[1], nodes), Layout(fsdp=8 * nodes, ep=ep)
    rebalancer = Rebalancer(Placed(priced, layout), steps=len(counts), spare=spare, shadows=shadows)
    return simulate(priced, layout, counts, rebalancer)


def test_the_example_of_eplb_is_placed_as_it_places_it():
    counts = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                           [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])  # fmt: skip
    assert replicated(counts, 16, 8, nodes=2, groups=4).experts.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@given(counted, st.sampled_from([0, 8, 16]))
@settings(max_examples=15, deadline=None)
def test_no_row_is_lost_and_no_rank_is_fuller_than_before(counts, spare):
    still = Placement.contiguous(2, E, 8)
    found = permuted(counts, still) if spare == 0 else replicated(counts, E + spare, 8)
    assert torch.allclose(found.rows(counts).sum((-1, -2)), counts.sum(-1))
    assert (found.replicas >= 1).all()
    if spare:
        assert (found.rows(counts).amax((-1, -2)) <= counts.amax(-1) + 1e-6).all()


def test_replicas_balance_what_an_order_cannot():
    counts = torch.tensor([[800] + [10] * (E - 1)]).double()
    still = Placement.contiguous(1, E, 8)
    assert permuted(counts, still).load(counts).item() > 5
    assert replicated(counts, E + 8, 8).load(counts).item() < 2  # nine replicas on eight ranks


def with_shadows(counts, ranks=8):
    own = torch.arange(E).view(ranks, -1)
    before = torch.cat([own, own[:, :1]], 1).flatten().expand(len(counts), -1)
    return shadowed(counts, Placement(before, ranks, E))


@given(counted)
@settings(max_examples=15, deadline=None)
def test_shadows_make_no_rank_fuller_and_leave_experts_where_they_are(counts):
    still, found = Placement.contiguous(2, E, 8), with_shadows(counts)
    assert torch.equal(found.held[:, :, :-1], still.held)
    assert torch.allclose(found.rows(counts).sum((-1, -2)), counts.sum(-1))
    assert (found.load(counts) <= still.load(counts) + 1e-9).all()


def test_a_hot_expert_has_shadows_on_the_emptiest_ranks_while_that_helps():
    counts = torch.tensor([[800] + [10] * (E - 1)]).double()
    found = with_shadows(counts)
    assert found.held[0, 1:, -1].tolist() == [0] * 7
    assert found.load(counts) < 1.2
    assert with_shadows(torch.full((1, E), 10.0)).held[0, :, -1].tolist() == list(range(0, E, 4))


def test_lending_costs_weights_and_gradients_in_every_pass():
    priced, counts = step(), torch.tensor([[800] + [10] * (E - 1)] * LAYERS).double()
    layout, found = Layout(fsdp=8, ep=8, accumulation=2), with_shadows(counts)
    each = 2 * priced.shape.expert_parameters  # bytes in 16 bits; the lender sends 7, there and back, twice
    lent = Placed(priced, layout, shadows=True)
    free = replace(priced, cluster=replace(priced.cluster, intra=Link(bandwidth=float("inf"), latency=0.0)))
    price = lent._lending(found)
    assert price.tolist() == pytest.approx([4 * (7 * each / 350e9 + 1e-5)] * LAYERS)
    assert Placed(free, layout, shadows=True)._lending(found).max() == 0
    still, nothing = Placement.contiguous(LAYERS, E, 8), with_shadows(torch.ones(LAYERS, E))
    assert torch.equal(nothing.rows(counts, once=True).sum(-1), still.rows(counts).sum(-1))
    assert torch.allclose(lent.seconds(nothing, counts[None]), lent.seconds(still, counts[None]), rtol=1e-2)
    assert lent.move(Placement.contiguous(LAYERS, E, 8), found)[0] == 0


def test_renaming_ranks_keeps_the_load_and_moves_less():
    counts = torch.rand(LAYERS, E, generator=torch.Generator().manual_seed(0)) ** 3
    placed = Placed(step(), Layout(fsdp=8, ep=8))
    before = replicated(counts, E + 8, 8)
    after = replicated(counts * (1 + 0.1 * torch.rand(LAYERS, E)), E + 8, 8)
    renamed = after.aligned(before)
    assert torch.allclose(renamed.load(counts), after.load(counts))
    assert placed.move(before, renamed)[0] <= placed.move(before, after)[0]
    assert placed.move(before, before)[0] == 0
    assert torch.equal(before.aligned(before).held.sort(-1).values, before.held.sort(-1).values)


def test_a_move_counts_the_optimizer_state_and_the_way_between_nodes():
    priced, layout = step(nodes=2), Layout(fsdp=16, ep=16)
    placed, still = Placed(priced, layout), Placement.contiguous(LAYERS, E, 16)
    order = torch.arange(E)
    order[[0, 31]] = order[[31, 0]]  # the first rank and the last one change an expert
    swapped = Placement(order.expand(LAYERS, -1), 16, E)
    sent, seconds = placed.move(still, swapped)
    each = priced.shape.expert_parameters * 14
    assert sent == pytest.approx(LAYERS * 2 * each)
    assert seconds[0].item() == pytest.approx(each / 45e9 + 2e-5)
    order[[0, 31, 2]] = torch.tensor([2, 31, 0])
    assert placed.move(still, Placement(order.expand(LAYERS, -1), 16, E))[1][0].item() == pytest.approx(
        each / 350e9 + 1e-5
    )


def test_a_lasting_hot_expert_is_moved_once_and_pays():
    counts = Workload.skewed(E, 1.0, layers=LAYERS).shares.expand(80, -1, -1)
    for spare, shadows, gain in ((0, 0, 1.0), (1, 0, 1.1), (0, 1, 1.0)):
        found = replay(counts, spare, shadows=shadows)
        assert found.speedup > gain
        assert len(found.moves) == 1
        assert found.load[-1] < found.load[0]


def shuffled(every, steps=80):
    generator = torch.Generator().manual_seed(0)
    shares = Workload.skewed(E, 0.8, layers=LAYERS).shares
    orders = [torch.randperm(E, generator=generator) for _ in range(steps // every)]
    return torch.cat([shares[:, :, order].expand(every, -1, -1) for order in orders])


SYNTHETIC = {
    "balanced": torch.ones(80, LAYERS, E),
    "noise": torch.rand(80, LAYERS, E, generator=torch.Generator().manual_seed(0)) ** 2,
    "turns every step": shuffled(1),
    "turns at every decision": shuffled(10),
    "drifts": (
        Workload.skewed(E, 0.8, layers=LAYERS).shares.log()
        + torch.randn(80, LAYERS, E, generator=torch.Generator().manual_seed(0)).cumsum(0) * 0.02
    ).softmax(-1),
}


@pytest.mark.parametrize(("spare", "shadows"), [(0, 0), (1, 0), (0, 1)])
@pytest.mark.parametrize("name", SYNTHETIC)
def test_rebalancing_is_never_slower_than_leaving_experts_alone(name, spare, shadows):
    found = replay(SYNTHETIC[name], spare, shadows=shadows)
    assert found.speedup >= 1
    if name in ("balanced", "turns every step"):
        assert not found.moves


@pytest.mark.data
@pytest.mark.parametrize("model", ["qwen", "gemma"])
def test_rebalancing_is_never_slower_on_a_real_trace(model):
    try:
        trace = read_trace(data_file(f"routing-traces/{model}.route.csv.gz"))
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    some = Workload.traced(trace.only(list(trace.layers)[::8]), snapshots=60).shares
    for ep, spare, shadows in ((8, 0, 0), (8, 1, 0), (32, 1, 0), (8, 0, 1), (32, 0, 1)):
        assert replay(some, spare, shadows=shadows, ep=ep, nodes=4).speedup >= 1


def test_replicas_and_shadows_together_are_refused():
    with pytest.raises(ValueError, match=r"spare=1 .* shadows=1 .* choose one"):
        Rebalancer(Placed(step(), Layout(fsdp=8, ep=8)), steps=10, spare=1, shadows=1)


def test_a_training_that_ends_soon_moves_nothing():
    counts = Workload.skewed(E, 1.0, layers=LAYERS).shares.expand(20, -1, -1)
    priced = step(inter=1e6)
    slow = replace(priced, cluster=replace(priced.cluster, intra=Link(bandwidth=1e8, latency=1e-5)))
    layout = Layout(fsdp=8, ep=8)
    for kind in ({"spare": 1}, {"shadows": 1}):
        found = simulate(slow, layout, counts, Rebalancer(Placed(slow, layout), steps=20, **kind))
        assert not found.moves
        assert found.speedup == 1


def test_five_hundred_devices_are_replayed_and_a_trace_of_another_model_is_refused():
    priced = step(experts=64, nodes=64)
    counts = Workload.skewed(64, 0.7, layers=LAYERS).shares.expand(5, -1, -1)
    found = simulate(priced, Layout(fsdp=512, ep=64), counts)
    assert found.speedup == 1
    assert (found.load > 2).all()
    assert "0 moves" in str(found)
    with pytest.raises(ValueError, match="4 layers of 32 experts"):
        simulate(priced, Layout(fsdp=512, ep=64), counts[:, :, :32])
