"""What a step costs both arms is measured by turns, and noise is said to be noise."""

from __future__ import annotations

import copy
import json
import signal
from types import SimpleNamespace

import pytest
import torch

from moeify.data.blocks import Blocks
from moeify.evaluate import pace as module
from moeify.evaluate.pace import Cost, Pace, measure_pace
from moeify.evaluate.run import Point, Run, Settings, Stopped
from moeify.evaluate.verdict import headline, verdict
from moeify.evaluate.versus import Versus, versus
from moeify.flops import Count
from moeify.inspect.page import size_rows
from moeify.sparsify import Recipe, sparsify
from tiny_models import VOCABULARY, causal_lm

COUNT = Count(parameters=1, active_parameters=1, flops=1, dense_flops=1)
SETTINGS = Settings(steps=4, batch=4, evaluations=2, device="cpu", learning_rate=1e-2, pairs=3)


def blocks(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return Blocks({"text": torch.randint(3, VOCABULARY, (size * 8,), generator=generator)}, 8)


def pace(sparse, dense, cpu=((2.0, 2, 2, 2), (1.0, 1, 1, 1))):
    return Pace(Cost(sparse, cpu[0]), Cost(dense, cpu[1]))


def models():
    torch.manual_seed(0)
    dense = causal_lm("llama")
    return sparsify(copy.deepcopy(dense), Recipe(num_experts=4), verbose=False), dense


@pytest.fixture
def clock(monkeypatch):
    """A clock that only models move."""
    now = SimpleNamespace(wall=0.0, cpu=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.cpu))
    return now


def slow(model, now, wall, cpu=0.0):
    def tick(module, *inputs):
        if module.training:
            now.wall += wall
            now.cpu += cpu

    model.register_forward_pre_hook(tick)


def test_load_that_comes_and_goes_falls_on_both_alike(clock):
    sparse, dense = models()
    load = iter([1, 1, 1, 1, 1, 1, 30, 30, 30, 30, 30, 30, 1, 1, 1, 1, 1, 1])  # others work in the second round

    def tick(cost):
        def forward(module, *inputs):
            clock.wall += cost * next(load)
            clock.cpu += cost

        return forward

    sparse.register_forward_pre_hook(lambda m, *i: tick(2.0)(m) if m.training else None)
    dense.register_forward_pre_hook(lambda m, *i: tick(1.0)(m) if m.training else None)
    found = measure_pace(sparse, dense, blocks(0, 32), blocks(1, 4), SETTINGS)
    assert found.sparse.wall == [2, 60, 2]
    assert found.dense.wall == [1, 30, 1]
    assert (found.ratio, found.ratios, found.clock) == (2.0, (2.0, 2.0), "wall-clock")


def test_turns_alternate_and_their_first_step_is_not_timed(clock):
    sparse, dense = models()
    order = []
    for name, model in (("sparse", sparse), ("dense", dense)):
        model.register_forward_pre_hook(lambda m, *i, name=name: order.append(name) if m.training else None)
    first = {"left": 1}

    def warm_up(module, *inputs):
        if module.training and first["left"]:
            first["left"] = 0
            clock.wall += 1000
        clock.wall += 1

    sparse.register_forward_pre_hook(warm_up)
    found = measure_pace(sparse, dense, blocks(0, 32), blocks(1, 4), SETTINGS)
    assert order == ["sparse"] * 3 + ["dense"] * 6 + ["sparse"] * 6 + ["dense"] * 3
    assert found.sparse.wall == [1, 1, 1]


def test_measuring_leaves_the_models_and_the_runs_as_they_are(tmp_path):
    def run(folder, pairs):
        settings = Settings(**vars(SETTINGS) | {"pairs": pairs})
        found = versus(
            lambda: causal_lm("llama"), Recipe(num_experts=4), blocks(0, 32), blocks(1, 4), tmp_path / folder, settings,
            log=lambda line: None,
        )  # fmt: skip
        return found, [[point.loss for point in run.points] for run in (*found.sparse, *found.dense)]

    measured, losses = run("measured", 2)
    assert losses == run("plain", 0)[1]
    assert measured.pace is not None
    saved = json.loads((tmp_path / "measured" / "pace.json").read_text(encoding="utf-8"))
    assert Pace.from_dict(saved) == measured.pace


def test_a_comparison_that_goes_on_keeps_the_pace_that_was_measured(tmp_path):
    def run():
        return versus(
            lambda: causal_lm("llama"), Recipe(num_experts=4), blocks(0, 32), blocks(1, 4), tmp_path, SETTINGS,
            resume=True, log=lambda line: None,
        )  # fmt: skip

    assert run().pace == run().pace


def test_a_signal_ends_the_measurement():
    sparse, dense = models()
    dense.register_forward_pre_hook(lambda m, *i: signal.raise_signal(signal.SIGINT) if m.training else None)
    with pytest.raises(Stopped, match="before the first step"):
        measure_pace(sparse, dense, blocks(0, 32), blocks(1, 4), SETTINGS)


def test_the_wall_clock_is_read_where_it_is_steady_and_cpu_time_where_it_is_not():
    assert pace((2.0, 2.02, 2, 2), (1.0, 1, 1, 1)).clock == "wall-clock"
    busy = pace((2.0, 6, 2, 9), (1.0, 1, 5, 1))
    assert (busy.clock, busy.ratio, busy.seconds, busy.wall_seconds) == ("CPU", 2.0, (2, 1), (4, 1))
    both = pace((2.0, 6, 2, 9), (1.0, 1, 5, 1), cpu=((2.0, 60, 2, 90), (1.0, 1, 50, 1)))
    assert both.clock == "wall-clock"
    on_gpu = Pace(Cost((2.0, 6, 2, 9), (1.0,) * 4), Cost((1.0, 1, 5, 1), (1.0,) * 4), on_cpu=False)
    assert on_gpu.clock == "wall-clock"


def curve(name, *losses, seed=0):
    return Run(name, seed, COUNT, [Point(i, i, i, 77.0 * i, loss) for i, loss in enumerate(losses)], {})


SPARSE, DENSE = curve("sparse", 5.0, 4.0, 3.0, 2.0, 1.0), curve("dense", 5.0, 4.2, 3.6, 3.2, 2.9)


def test_equal_time_is_steps_times_what_a_step_was_measured_to_cost():
    found = Versus([SPARSE], [DENSE], pace((2.0,) * 4, (1.0,) * 4)).at_equal("seconds")
    assert (found.sparse, found.dense) == (3.0, 2.9)  # the dense model ends after 4 s, when the other has taken 2 steps
    assert found.between == pytest.approx((0.1, 0.1))
    assert found.is_clear


def test_what_noise_can_turn_round_is_too_noisy_to_tell():
    noisy = Versus([SPARSE], [DENSE], pace((2.0, 1.2, 2, 2.4), (1.0, 1, 1, 1), cpu=((2.0, 9, 1, 3), (1.0, 1, 1, 1))))
    found = noisy.at_equal("seconds")
    assert min(found.between) < 0 < max(found.between)
    assert not found.is_clear
    assert "wall-clock time the sparse model's loss is 0.1000 higher, too noisy to tell, between -0" in verdict(noisy)
    assert headline(noisy) == (
        "The sparse model is ahead at equal tokens and equal training FLOPs, and too close to its dense baseline to "
        "tell at equal wall-clock time. One seed says nothing about noise between seeds."
    )


def test_a_difference_within_the_spread_of_the_seeds_is_too_noisy_to_tell():
    close = Versus([SPARSE, curve("sparse", 5.0, 4)], [curve("dense", 5.0, 1.5), curve("dense", 5.0, 3.7)])
    found = close.at_equal("tokens")
    assert not found.is_clear
    assert "too noisy to tell;" in verdict(close)


def test_a_speed_by_cpu_time_is_called_so():
    def label(found):
        return size_rows(Versus([SPARSE], [DENSE], found))[1][3][0]

    assert label(pace((2.0, 6, 2, 9), (1.0, 1, 5, 1))) == "training tokens per CPU second"
    assert label(pace((2.0,) * 4, (1.0,) * 4)) == "training tokens per second"


def test_speeds_come_from_the_measured_pace():
    assert Versus([SPARSE], [DENSE], pace((2.0,) * 4, (1.0,) * 4)).tokens_per_second == (0.5, 1.0)
    assert Versus([SPARSE], [DENSE]).tokens_per_second == (1 / 77, 1 / 77)
