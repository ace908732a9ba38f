"""Experts made of a dense network: all of it, a part of it, or its kind."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from moeify.experts import FFN, ClampedGlu, Constant, Glu, Identity, Masked, Plain, Zero
from moeify.find import DenseFFN
from moeify.sparsify import (
    Recipe,
    copies,
    fresh,
    masked,
    sparsify,
    splits,
    with_free,
    with_multiplicative_bias,
)
from moeify.sparsify.split import clustered, importance, random
from moeify.store import load, save
from tiny_models import causal_lm, inputs

SPLITS = [random, clustered, importance]


def network(gated=True, up_bias=True, down_bias=True, width=6, hidden=12, width_out=6) -> DenseFFN:
    maps = 2 if gated else 1
    ups = [nn.Linear(width, hidden, bias=up_bias) for _ in range(maps)]
    return DenseFFN(ups, nn.Linear(hidden, width_out, bias=down_bias), Glu(F.silu) if gated else Plain(F.gelu)).double()


def answers(experts, x):
    """What every expert says to every token: (E, T, O)."""
    num_experts = experts.num_experts
    counts = torch.full((num_experts,), len(x))
    return experts(x.repeat(num_experts, 1), counts).unflatten(0, (num_experts, len(x)))


networks = st.builds(
    network,
    gated=st.booleans(),
    up_bias=st.booleans(),
    down_bias=st.booleans(),
    width_out=st.sampled_from([1, 6, 9]),
)


@given(dense=networks, num_experts=st.integers(1, 5))
def test_every_copy_answers_as_the_dense_network(dense, num_experts):
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = dense(x).expand(num_experts, -1, -1)
    torch.testing.assert_close(answers(copies(dense, num_experts), x), expected)


@given(dense=networks, scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_scaled_copies_answer_as_many_times(dense, scale):
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.testing.assert_close(answers(copies(dense, 3, scale=scale), x), scale * dense(x).expand(3, -1, -1))


def test_noise_makes_copies_differ_by_its_share_and_spares_biases():
    dense = network(width=64, hidden=128, width_out=64)
    experts, exact = copies(dense, 4, noise=0.1), copies(dense, 4)
    for (name, noisy), clean in zip(experts.named_parameters(), exact.parameters(), strict=True):
        share = ((noisy - clean).std() / clean.std()).item()
        assert share == pytest.approx(0.0 if name.endswith("bias") else 0.1, rel=0.05), name
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


@pytest.mark.parametrize("gated", [True, False])
@given(drop=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_drop_is_the_share_of_hidden_units_that_start_anew(gated, drop):
    dense = network(gated=gated)
    experts, exact = copies(dense, 4, drop=drop), copies(dense, 4)
    changed_down = (experts.down_proj != exact.down_proj).all(1)  # (E, H)
    changed_up = (experts.up[0] != exact.up[0]).all(2).unflatten(1, (-1, 12))  # (E, maps, H)
    assert (changed_down.sum(-1) == drop * 12).all()
    assert torch.equal(changed_up, changed_down.unsqueeze(1).expand_as(changed_up)), "other units into than out of"
    untouched = ~changed_down.unsqueeze(1).expand_as(experts.down_proj)
    assert torch.equal(experts.down_proj[untouched], exact.down_proj[untouched])


def test_dropped_units_are_drawn_like_those_they_replace():
    dense = network(width=64, hidden=512, width_out=64)
    nn.init.normal_(dense.down.weight, 0.5, 0.2)
    redrawn = copies(dense, 2, drop=1.0).down_proj
    assert redrawn.mean().item() == pytest.approx(0.5, rel=0.02)
    assert redrawn.std().item() == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("options", [{"drop": 2}, {"drop": -0.1}, {"noise": -1}, {"noise": float("nan")}])
def test_shares_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="are shares"):
        copies(nn.Linear(2, 2), 2, **options)


def test_drops_differ_between_experts():
    experts = copies(network(hidden=128), 2, drop=0.5)
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


@pytest.mark.parametrize("split", SPLITS)
@given(dense=networks, num_experts=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_parts_add_up_to_the_dense_network(split, dense, num_experts):
    x = torch.randn(7, 6, dtype=torch.float64)
    experts = splits(dense, num_experts, split=split, scale=1)
    torch.testing.assert_close(answers(experts, x).sum(0), dense(x))
    equally_weighted = answers(splits(dense, num_experts, split=split), x).mean(0)
    torch.testing.assert_close(equally_weighted, dense(x))


@pytest.mark.parametrize("split", SPLITS)
@given(dense=networks, parts=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_hidden_unit_goes_to_exactly_one_part(split, dense, parts):
    units = split(dense, parts)
    assert units.shape == (parts, 12 // parts)
    assert sorted(units.flatten().tolist()) == list(range(12))


def test_parts_by_importance_are_equally_important():
    dense = network(gated=False, up_bias=False, hidden=8)
    with torch.no_grad():
        dense.ups[0].weight.copy_(torch.arange(1.0, 9.0).unsqueeze(1).expand(8, 6))
        dense.down.weight.fill_(1.0)
    assert (importance(dense, 4) + 1).sum(-1).tolist() == [9, 9, 9, 9]


def test_clusters_are_units_that_read_alike():
    dense = network(gated=False, hidden=12)
    directions = torch.eye(6, dtype=torch.float64)[:3]
    kind = torch.randperm(12) % 3
    with torch.no_grad():
        dense.ups[0].weight.copy_(directions[kind] + 0.01 * torch.randn(12, 6))
    best = min(len(set(part)) for part in kind[clustered(dense, 3)].tolist())
    assert best == 1


def test_a_number_that_does_not_divide_the_units_is_answered_with_those_that_do():
    with pytest.raises(ValueError, match=r"172 hidden units cannot be split into 8 .*: 2, 4"):
        splits(network(hidden=172), 8)
    with pytest.raises(ValueError, match="none near"):
        splits(network(hidden=173), 8)


def test_only_a_network_can_be_split_scaled_dropped_or_sized():
    module = nn.Sequential(nn.Linear(6, 6))
    for make in (
        lambda: splits(module, 2),
        lambda: copies(module, 2, drop=0.5),
        lambda: copies(module, 2, scale=2.0),
        lambda: fresh(module, 2, granularity=2),
        lambda: fresh(module, 2, hidden=3),
        lambda: fresh(module, 2, zero=True),
    ):
        with pytest.raises(ValueError, match="a Sequential"):
            make()


def test_whole_modules_are_copied_with_noise():
    module = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    x = torch.randn(4, 6)
    exact, noisy = copies(module, 3), copies(module, 3, noise=0.1)
    torch.testing.assert_close(answers(exact, x), module(x).expand(3, -1, -1))
    assert not torch.equal(noisy.experts[0][0].weight, noisy.experts[1][0].weight)


@pytest.mark.parametrize(("options", "hidden"), [({}, 12), ({"granularity": 3}, 4), ({"hidden": 5}, 5)])
def test_fresh_experts_have_the_size_asked_for(options, hidden):
    experts = fresh(network(), 5, **options)
    assert experts.down_proj.shape == (5, 6, hidden)
    assert experts.gate_up_proj.shape == (5, 2 * hidden, 6)


def test_fresh_experts_are_drawn_as_wide_as_the_dense_weights():
    dense = network(width=64, hidden=128, width_out=64)
    nn.init.normal_(dense.down.weight, 0.0, 0.3)
    experts = fresh(dense, 4)
    assert experts.down_proj.std().item() == pytest.approx(0.3, rel=0.05)
    assert experts.gate_up_proj.std().item() == pytest.approx(dense.up_weight.std().item(), rel=0.05)
    assert not experts.gate_up_proj_bias.any()
    assert not experts.down_proj_bias.any()


def test_fresh_experts_may_have_another_activation_and_biases():
    experts = fresh(network(), 5, activation=ClampedGlu(), bias=False)
    assert experts.activation == ClampedGlu()
    assert {name for name, _ in experts.named_parameters()} == {"gate_up_proj", "down_proj"}
    with pytest.raises(ValueError, match="need a feed-forward network"):
        fresh(nn.Linear(6, 6), 5, bias=True)


def test_zero_experts_answer_nothing_and_still_learn():
    experts = fresh(network(), 3, zero=True)
    y = answers(experts, torch.randn(4, 6, dtype=torch.float64))
    assert not y.any()
    y.sum().backward()
    assert experts.down_proj.grad.any()


def test_a_granularity_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="granularity of 5 does not divide the 12"):
        fresh(network(), 2, granularity=5)


@pytest.mark.parametrize("make", [copies, splits, fresh])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_experts_keep_dtype_and_can_be_made_without_values(make, dtype):
    dense = network().to(dtype)
    assert {parameter.dtype for parameter in make(dense, 4).parameters()} == {dtype}
    if make is not splits:
        assert all(parameter.is_meta for parameter in make(dense.to("meta"), 4).parameters())


@pytest.mark.parametrize("make", [copies, splits, fresh])
def test_making_experts_leaves_the_dense_network_as_it_was(make):
    dense = network()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    experts = make(dense, 4)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_experts_are_drawn_by_their_fan_in_and_cut_off(dtype):
    experts = fresh(network(width=64, hidden=256).to(dtype), 4, variance=0.1)
    for weight, fan_in in ((experts.gate_up_proj, 64), (experts.down_proj, 256)):
        std = (0.1 / fan_in) ** 0.5
        assert weight.dtype == dtype
        assert weight.abs().max() <= 2 * std * 1.01
        assert weight.float().std().item() == pytest.approx(0.88 * std, rel=0.03)  # the tails are missing


def test_masked_experts_are_what_they_mask():
    dense, x = network(), torch.randn(7, 6, dtype=torch.float64)
    experts = masked(dense, 3, experts=copies, p=0.3)
    assert isinstance(experts, Masked)
    assert experts.p == 0.3
    torch.testing.assert_close(answers(experts.eval(), x), dense(x).expand(3, -1, -1))


@given(dense=networks)
def test_free_experts_come_last_and_answer_nothing_the_token_or_a_vector(dense):
    if dense.width_out != 6:
        with pytest.raises(ValueError, match="outputs as wide as their inputs"):
            with_free(dense, 8)
        return
    experts = with_free(dense, 8)
    assert [type(bank) for bank in experts.banks] == [FFN, Constant, Identity, Zero]
    x = torch.randn(7, 6, dtype=torch.float64)
    said = answers(experts, x)
    assert said.dtype == torch.float64
    assert not torch.allclose(said[4], said[5])
    assert torch.equal(said[6], x)
    assert not said[7].any()


def test_all_experts_but_the_free_ones_work():
    assert [bank.num_experts for bank in with_free(network(), 6, zero=0, copy=3, constant=0).banks] == [3, 3]
    with pytest.raises(ValueError, match="leave none of 4 that works"):
        with_free(network(), 4)


def test_a_multiplicative_bias_leaves_copies_as_they_are_and_is_saved(tmp_path):
    model = causal_lm("llama")
    probe = inputs(model)
    before = model(**probe).logits
    recipe = Recipe(num_experts=4, experts=partial(with_multiplicative_bias, experts=copies))
    sparsify(model, recipe, verbose=False)
    torch.testing.assert_close(model(**probe).logits, before)
    nn.init.normal_(model.model.layers[0].mlp.experts.multiplicative_bias)
    expected = model(**probe).logits
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(**probe).logits, expected)


def test_a_multiplicative_bias_needs_hidden_units():
    with pytest.raises(ValueError, match="stands between the halves of feed-forward experts, and these are Each"):
        with_multiplicative_bias(nn.Linear(4, 4), 2, experts=copies)
