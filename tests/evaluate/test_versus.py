"""A sparse model against its dense twin: the arithmetic, and the fairness."""

from __future__ import annotations

import json
import signal
from functools import partial
from statistics import stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.blocks import Blocks
from moeify.evaluate.run import Point, Run, Settings, Stopped
from moeify.evaluate.versus import Versus, loss_at, versus
from moeify.files import write_json
from moeify.flops import Count
from moeify.routers.topk import TopK
from moeify.sparsify import Recipe
from tiny_models import VOCABULARY, causal_lm

COUNT = Count(parameters=1, active_parameters=1, flops=1, dense_flops=1)
SETTINGS = Settings(steps=4, batch=4, evaluations=2, device="cpu", learning_rate=1e-2, pairs=0)


def curve(*points, name="sparse", seed=0):
    return Run(name, seed, COUNT, [Point(i, *point) for i, point in enumerate(points)], {})


SPARSE = curve((0, 0, 0, 5.0), (100, 300, 4, 3.0), (200, 600, 8, 2.0))  # tokens, FLOPs, seconds, loss
DENSE = curve((0, 0, 0, 5.0), (100, 200, 1, 3.5), (200, 400, 2, 3.0), name="dense")


@pytest.mark.parametrize(("axis", "sparse"), [("tokens", 2.0), ("flops", 3 - 1 / 3), ("seconds", 4.0)])
def test_the_one_that_spent_more_is_read_where_the_other_ended(axis, sparse):
    found = Versus([SPARSE], [DENSE]).at_equal(axis)
    assert (found.sparse, found.dense) == (pytest.approx(sparse), 3.0)
    assert found.difference == pytest.approx(sparse - 3.0)
    assert (found.spread, found.seeds) == (None, 1)


def test_the_spread_is_that_of_the_differences_of_pairs():
    pairs = [(2.0, 3.0), (4.0, 4.5), (1.0, 1.2)]
    runs = [[curve((0, 0, 0, 9.0), (1, 1, 1, loss)) for loss in arm] for arm in zip(*pairs, strict=True)]
    found = Versus(*runs).at_equal("tokens")
    assert found.difference == pytest.approx((-1 - 0.5 - 0.2) / 3)
    assert found.spread == pytest.approx(stdev([-1, -0.5, -0.2]))
    assert found.seeds == 3


curves = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.floats(0, 9)), min_size=1)


def grown(steps):
    points = [(0, 0, 0, 5.0)]
    for *spent, loss in steps:
        points.append((*(a + b for a, b in zip(points[-1], spent, strict=False)), loss))
    return curve(*points)


@given(curves, curves)
def test_exchanging_the_arms_changes_the_sign_alone(one, other):
    there, back = Versus([grown(one)], [grown(other)]), Versus([grown(other)], [grown(one)])
    for a, b in zip(there.differences, back.differences, strict=True):
        assert a.difference == -b.difference


@given(curves, st.floats(0, 1))
def test_an_interpolated_loss_lies_between_its_neighbours(steps, share):
    run = grown(steps)
    budget = share * run.points[-1].seconds
    after = next(i for i, point in enumerate(run.points) if point.seconds >= budget)
    neighbours = [point.loss for point in run.points[max(0, after - 1) : after + 1]]
    assert min(neighbours) - 1e-9 <= loss_at(run, "seconds", budget) <= max(neighbours) + 1e-9
    assert [loss_at(run, "tokens", point.tokens) for point in run.points] == [point.loss for point in run.points]


def test_a_run_that_ends_before_the_others_first_point_is_an_error():
    late = curve((100, 100, 100, 3.0), (200, 200, 200, 2.0))
    with pytest.raises(ValueError, match=r"first validation loss of the sparse run was measured after 100 seconds"):
        Versus([late], [DENSE]).at_equal("seconds")


def test_the_dictionary_has_every_axis_and_run():
    found = json.loads(json.dumps(Versus([SPARSE], [DENSE]).to_dict()))
    assert found["at_equal"].keys() == {"tokens", "flops", "seconds"}
    assert [run["name"] for run in found["runs"]] == ["sparse", "dense"]
    assert [run["tokens_per_second"] for run in found["runs"]] == [25, 100]


def blocks(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return Blocks({"text": torch.randint(3, VOCABULARY, (size * 8,), generator=generator)}, 8)


def compare(folder, recipe=None, build=None, **options):
    return versus(
        build or (lambda: causal_lm("llama")), recipe or Recipe(num_experts=4), blocks(0, 32), blocks(1, 4), folder,
        SETTINGS, **{"log": lambda line: None} | options,
    )  # fmt: skip


def test_both_see_the_same_tokens_in_the_same_order_and_start_from_the_same_weights(tmp_path):
    seen, starts = [], []

    def look(model, inputs, named):
        if model.training:
            if len(seen) % SETTINGS.steps == 0:
                starts.append({name: p.clone() for name, p in model.named_parameters() if ".mlp." not in name})
            seen.append(named["input_ids"])

    def build():
        model = causal_lm("llama")
        model.register_forward_pre_hook(look, with_kwargs=True)
        return model

    compare(tmp_path, build=build)
    assert len(seen) == 2 * SETTINGS.steps
    assert all(torch.equal(a, b) for a, b in zip(seen[: SETTINGS.steps], seen[SETTINGS.steps :], strict=True))
    assert starts[0].keys() == starts[1].keys()
    assert "model.embed_tokens.weight" in starts[0]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_a_single_expert_learns_what_its_dense_twin_learns(tmp_path):
    alone = Recipe(num_experts=1, router=partial(TopK, k=1, normalize=False))
    found = compare(tmp_path, alone)
    sparse, dense = ([point.loss for point in arm[0].points] for arm in (found.sparse, found.dense))
    assert sparse == pytest.approx(dense, abs=1e-5)
    assert dense[-1] < dense[0]


def test_seeds_make_pairs_of_different_runs(tmp_path):
    found = compare(tmp_path, build=None, seeds=2)
    assert [run.seed for run in found.sparse] == [run.seed for run in found.dense] == [0, 1]
    assert found.sparse[0].points[-1].loss != found.sparse[1].points[-1].loss
    assert found.at_equal("tokens").spread is not None


def losses(found):
    return [[point.loss for point in run.points] for run in (*found.sparse, *found.dense)]


def test_a_stopped_comparison_goes_on_and_a_finished_one_is_not_repeated(tmp_path):
    whole, passes = compare(tmp_path / "whole"), []

    def stop(model, *inputs):
        passes.append(model.training)
        if sum(passes) == SETTINGS.steps + 2 and model.training:
            signal.raise_signal(signal.SIGINT)

    def build():
        model = causal_lm("llama")
        model.register_forward_pre_hook(stop)
        return model

    with pytest.raises(Stopped, match=r"after step 2 of 4, saved in .*dense-0"):
        compare(tmp_path / "cut", build=build)
    told, kept = [], {}
    again = compare(tmp_path / "cut", resume=True, log=told.append)
    assert told == ["training the dense model, seed 0"]
    assert losses(again) == losses(whole)
    told.clear()
    assert compare(tmp_path / "cut", resume=True, log=told.append, on_model=kept.__setitem__) == again
    assert told == []
    write_json(tmp_path / "cut" / "dense-0" / "run.json", {"points": [{"stop": 1}]})
    with pytest.raises(ValueError, match=r"run\.json is damaged .*delete it, and the run is repeated"):
        compare(tmp_path / "cut", resume=True)
    models = {}
    compare(tmp_path / "models", on_model=models.__setitem__)
    ids = blocks(1, 4).input_ids
    for name in ("sparse", "dense"):
        assert torch.equal(kept[name].eval()(ids).logits, models[name].eval()(ids).logits)


def test_a_checkpoint_that_was_cut_off_counts_as_none(tmp_path):
    (tmp_path / "sparse-0" / "checkpoint-2.tmp").mkdir(parents=True)
    assert len(compare(tmp_path, resume=True).sparse[0].points) == 3
