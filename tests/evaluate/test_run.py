"""One training run: what its curve holds, and what measuring it must not change."""

from __future__ import annotations

import json
import math
import signal
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from moeify.data.blocks import Blocks
from moeify.evaluate import run as module
from moeify.evaluate.objective import NextToken
from moeify.evaluate.run import Run, Settings, Stopped, train_run, validate
from moeify.flops import count
from tiny_models import VOCABULARY, causal_lm

LENGTH = 8


def blocks(seed, **sizes):
    generator = torch.Generator().manual_seed(seed)
    streams = {name: torch.randint(3, VOCABULARY, (n * LENGTH,), generator=generator) for name, n in sizes.items()}
    return Blocks(streams, LENGTH)


def train(folder, model=None, steps=6, **options):
    settings = Settings(steps=steps, batch=4, evaluations=3, device="cpu", learning_rate=1e-2)
    settings = SimpleNamespace(**vars(settings) | options)
    model = causal_lm("llama") if model is None else model
    return train_run("dense", model, blocks(0, code=20), blocks(1, code=4, prose=2), folder, settings)


def test_the_curve_starts_before_the_first_step_and_is_measured_evenly(tmp_path):
    model = causal_lm("llama")
    before = validate(model, blocks(1, code=4, prose=2), Settings(batch=4), NextToken()).loss
    run = train(tmp_path, model)
    assert [point.step for point in run.points] == [0, 2, 4, 6]
    assert [point.tokens for point in run.points] == [0, 64, 128, 192]
    assert run.points[0].loss == before
    assert run.points[0].seconds == 0
    per_token = 3 * count(model, tokens=LENGTH).flops
    assert [point.flops for point in run.points] == [point.tokens * per_token for point in run.points]
    assert run.tokens_per_second == 192 / run.points[-1].seconds


def test_the_last_point_is_the_loss_of_the_trained_model(tmp_path):
    model = causal_lm("llama")
    run = train(tmp_path, model)
    last = validate(model, blocks(1, code=4, prose=2), Settings(batch=4), NextToken())
    assert (run.points[-1].loss, run.domains, run.scores) == (last.loss, last.domains, last.scores)


def test_validation_loss_is_the_mean_over_tokens_for_each_domain():
    model, data = causal_lm("llama").train(), blocks(0, code=5, prose=2)
    found = validate(model, data, Settings(batch=2), NextToken())
    with torch.no_grad():
        logits = model(input_ids=data.input_ids).logits
    each = [cross_entropy(row[:-1], ids[1:]).item() for row, ids in zip(logits, data.input_ids, strict=True)]
    assert found.loss == pytest.approx(fmean(each))
    assert found.scores == pytest.approx({"perplexity": math.exp(fmean(each))}, rel=1e-4)
    assert found.domains == pytest.approx({"code": fmean(each[:5]), "prose": fmean(each[5:])})
    assert model.training


@pytest.mark.parametrize(("given", "first"), [(10, 1), (9, 0)])
def test_evaluation_blocks_are_taken_evenly_and_no_more_than_asked(given, first):
    model, data, seen = causal_lm("llama"), blocks(0, code=given), []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    validate(model, data, Settings(batch=2, evaluation_blocks=5), NextToken())
    assert torch.equal(torch.cat(seen), data.input_ids[first::2])


def test_measuring_changes_nothing_of_the_training(tmp_path):
    losses = []
    for evaluations in (1, 6):
        folder = tmp_path / str(evaluations)
        train(folder, evaluations=evaluations)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([(row["step"], row["loss_hex"]) for row in map(json.loads, lines)])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_seconds_are_those_of_training_alone(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    model = causal_lm("llama")

    def tick(module, *inputs):
        clock.now += 1 if module.training else 1000

    model.register_forward_pre_hook(tick)
    assert [point.seconds for point in train(tmp_path, model).points] == [0, 2, 4, 6]


def test_a_run_is_the_same_after_a_way_through_json(tmp_path):
    run = train(tmp_path)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_a_signal_stops_a_run_that_then_goes_on_to_the_same_curve(tmp_path):
    whole = train(tmp_path / "whole")
    model, steps = causal_lm("llama"), []

    def stop(module, *inputs):
        steps.append(module.training)
        if sum(steps) == 3 and module.training:
            signal.raise_signal(signal.SIGINT)

    model.register_forward_pre_hook(stop)
    with pytest.raises(Stopped, match="stopped after step 3 of 6, saved in"):
        train(tmp_path / "cut", model)
    settings = Settings(steps=6, batch=4, evaluations=3, device="cpu", learning_rate=1e-2)
    again = train_run(
        "dense", causal_lm("llama"), blocks(0, code=20), blocks(1, code=4, prose=2), tmp_path / "cut", settings,
        resume=True,
    )  # fmt: skip
    assert [(p.step, p.loss) for p in again.points] == [(p.step, p.loss) for p in whole.points]
    assert again.domains == whole.domains
    assert again.points[2].seconds > again.points[1].seconds > 0
