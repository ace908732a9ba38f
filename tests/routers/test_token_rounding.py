import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import losses
from moeify.experts import FFN
from moeify.moe import MoE
from moeify.registry import decode, encode
from moeify.routers import Capacity, DefaultVector, MultiGate, TokenRounding, TopK
from moeify.routers.token_rounding import balanced, down, nearest, token_rounding, up
from strategies import agree, masks, route, seeds, sharpen

D, E = 8, 4
ROUNDINGS = [nearest, up, down, balanced]
tiles = st.integers(1, 9)


def rounded(tile, rounding=nearest, **options):
    router = TokenRounding(TopK(D, E, **options), tile=tile, rounding=rounding)
    sharpen(router)
    return router


def pairs(routing):
    return set(zip(routing.source.tolist(), routing.expert.tolist(), strict=True))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(tiles, st.integers(1, 40), st.integers(1, E), seeds)
def test_every_expert_gets_whole_tiles_and_less_than_one_more_or_less(rounding, tile, tokens, k, seed):
    torch.manual_seed(seed)
    router = rounded(tile, rounding, k=k, normalize=k > 1)
    routing = route(router, torch.randn(tokens, D))
    assert (routing.counts % tile == 0).all()
    assert ((routing.counts - routing.assigned).abs() < tile).all()
    assert routing.counts.tolist() == routing.expert.bincount(minlength=E).tolist()
    assert len(pairs(routing)) == len(routing.source)


@given(tiles, st.integers(1, 40), seeds)
def test_an_expert_drops_its_weakest_or_adds_the_best_of_the_others(tile, tokens, seed):
    torch.manual_seed(seed)
    router, x = rounded(tile), torch.randn(tokens, D)
    before, after = route(router.router, x), route(router, x)
    weight = torch.zeros(tokens, E).index_put((before.source, before.expert), before.weight)
    asked, served = pairs(before), pairs(after)
    for e in range(E):
        of_e = {(t, e) for t in range(tokens)}
        lost, added = (asked - served) & of_e, (served - asked) & of_e
        assert not (lost and added)
        kept, others = asked & served & of_e, of_e - asked - served
        assert all(weight[a] <= weight[b] for a in lost for b in kept)
        assert all(before.scores[a] >= before.scores[b] for a in added for b in others)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=70), st.integers(1, 128))
def test_balanced_rounding_never_misses_or_gains_more_than_half_a_tile_in_all(counts, tile):
    counts = torch.tensor(counts)
    found = balanced(counts, tile)
    assert ((found == down(counts, tile)) | (found == up(counts, tile))).all()
    assert (2 * (found - counts).cumsum(0).abs() <= tile).all()


@pytest.mark.parametrize("tile", [1, 2, 3, 64, 128])
def test_over_all_numbers_of_rows_nearest_rounding_loses_half_a_row_at_most(tile):
    counts = torch.arange(10 * tile)
    lost = (counts - nearest(counts, tile)).double().mean()
    assert 0 <= lost <= 0.5
    assert (2 * (counts - nearest(counts, tile)).abs() <= tile).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_tiles_of_one_row_change_nothing(rounding):
    x = torch.randn(3, 5, D)
    layer = MoE(rounded(1, rounding), FFN(E, D, 6))
    alone = MoE(layer.router.router, layer.experts)
    agree(layer(x), [*layer.parameters()], alone(x), [*alone.parameters()])


def test_in_evaluation_tokens_choose():
    router, x = rounded(4).eval(), torch.randn(21, D)
    assert torch.equal(route(router, x).source, route(router.router, x).source)
    assert not router.causal


@given(masks(), tiles, seeds)
def test_padding_is_never_chosen_and_changes_nothing(mask, tile, seed):
    torch.manual_seed(seed)
    x = torch.randn(*mask.shape, D)
    router = rounded(tile, up)
    padded, alone = route(router, x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask), route(router, x[mask])
    assert torch.equal(padded.source, mask.flatten().nonzero().squeeze(1)[alone.source])
    assert torch.equal(padded.counts, alone.counts)
    assert torch.equal(padded.weight, alone.weight)


@pytest.mark.parametrize("rounding", [up, down])
def test_rows_that_are_added_and_rows_that_stay_teach_the_router(rounding):
    router = rounded(4, rounding)
    routing = route(router, torch.randn(21, D))
    (gradient,) = torch.autograd.grad(routing.weight.square().sum(), router.router.weight)
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() == gradient.numel()


def test_losses_go_by_what_was_asked_for():
    router, x = rounded(4), torch.randn(21, D)
    routing = route(router, x)
    assert torch.equal(routing.assigned, route(router.router, x).counts)
    assert not torch.equal(routing.assigned, routing.counts)
    torch.testing.assert_close(losses.balance(routing), losses.balance(route(router.router, x)))


def test_it_rounds_what_a_capacity_leaves():
    router = TokenRounding(Capacity(TopK(D, E), factor=0.5), tile=4, rounding=down)
    sharpen(router)
    routing = route(router, torch.randn(32, D))
    assert (routing.counts % 4 == 0).all()
    assert routing.counts.max() <= math.ceil(0.5 * 2 * 32 / E)


def test_fewer_tokens_than_a_tile_have_no_rows():
    assert route(rounded(128, up), torch.randn(9, D)).counts.tolist() == [0] * E


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (TopK(D, E, per="sequence"), "scores all experts for every token"),
        (MultiGate(D, E, gates=2), "one weight per row"),
    ],
)
def test_decisions_that_cannot_be_rounded_are_refused(inner, reason):
    with pytest.raises(ValueError, match=reason):
        route(TokenRounding(inner, tile=2), torch.randn(3, 5, D))


def test_who_speaks_for_the_other_experts_is_refused():
    layer = MoE(TokenRounding(DefaultVector(D, E), tile=2), FFN(E, D, 6))
    with pytest.raises(ValueError, match="substitutes a default output for the others"):
        layer(torch.randn(3, 5, D))


def test_a_tile_without_rows_is_refused():
    with pytest.raises(ValueError, match="say 128"):
        TokenRounding(TopK(D, E), tile=0)


def test_a_file_names_the_rounding():
    written = encode("router", partial(token_rounding, router=partial(TopK, k=3), tile=64, rounding=balanced))
    router = decode("router", written)(D, E)
    assert (router.tile, router.rounding, router.router.k) == (64, balanced, 3)
