"""LIMoE by one command: one tower for both modalities, its entropies, and which modality uses which experts."""

from __future__ import annotations

import json
from math import exp, log

import pytest
import torch

from command_line import TINY, moeify
from moeify import record, sparsify
from moeify.cli.train import Train
from moeify.models.one_tower import CAPTION, PICTURE
from moeify.sparsify import recipes
from moeify.store import load
from moeify.tasks.base import Shape
from moeify.tasks.contrastive import Contrastive
from moeify.tasks.modalities import GlobalEntropy, LocalEntropy, use_of_experts

SMALL = {"shape": Shape(width=16, layers=2, heads=2, hidden=32), "size": 16, "patch": 4}


@pytest.fixture(scope="module")
def setup():
    return Contrastive(**SMALL, towers=1).prepare(None, None)


@pytest.fixture
def model(setup):
    torch.manual_seed(0)
    return sparsify(setup.build(), recipes["limoe"], probe=setup.probe, verbose=False).eval()


def test_an_embedding_depends_neither_on_padding_nor_on_the_other_pairs(setup):
    tower = setup.build().eval()
    samples = sorted((setup.train[i] for i in range(20)), key=lambda each: len(each["input_ids"]))[:: 19 // 2]
    with torch.no_grad():
        together = tower(**setup.objective.collate(samples))
        alone = [tower(**setup.objective.collate([sample])) for sample in samples]
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(each, name) for each in alone]))


def test_routers_know_the_modality_of_every_real_token(setup, model):
    batch = setup.objective.collate([setup.train[i] for i in range(4)])
    with torch.no_grad(), record(model) as decisions:
        model(**batch)
    (routing,) = decisions.values()
    assert (routing.evidence.label == PICTURE).sum() == 4 * 16
    assert (routing.evidence.label == CAPTION).sum() == batch["attention_mask"].sum()


def test_use_of_experts_is_counted_for_each_modality(setup, model):
    samples = [setup.train[i] for i in range(4)]
    batch = setup.objective.collate(samples)
    with torch.no_grad(), record(model) as decisions:
        model(**batch)
    ((name, routing),) = decisions.items()
    label, counts = routing.evidence.label, {"pictures": 64, "captions": int(batch["attention_mask"].sum())}
    (line,) = use_of_experts(model, batch)
    assert line.startswith(f"{name}: pictures use ")
    kept = 0.0
    for part, (modality, value) in zip(line.partition(": ")[2].split("; "), enumerate(counts.values()), strict=True):
        chosen = routing.choices.indices[label == modality].flatten().tolist()
        shares = [chosen.count(e) / len(chosen) for e in set(chosen)]
        assert part.split()[2] == f"{exp(-sum(p * log(p) for p in shares)):.1f}"
        kept += value * (1 - int(part.split(", ")[1].split("%")[0]) / 100)
    assert kept == pytest.approx(int(routing.counts.sum()), abs=0.01 * sum(counts.values()))
    assert use_of_experts(setup.build(), batch) == []


def test_the_recipe_brings_its_tower_and_its_losses(tmp_path):
    job = Train(task="contrastive", recipe="limoe", experts=16, output=tmp_path).job()
    assert job.task.towers == 1
    assert job.settings.sparse.balance == 0
    assert job.settings.sparse.losses == [
        (0.04, LocalEntropy("captions")),
        (0.04, GlobalEntropy("pictures", 10.0)),
        (0.04, GlobalEntropy("captions", 4.5)),
    ]
    without = Train(task="contrastive", recipe="limoe", settings=["entropy=0"], output=tmp_path).job().settings.sparse
    assert (without.balance, without.losses) == (0.01, [])
    clip = Train(task="contrastive", recipe="mixtral", output=tmp_path).job()
    assert (clip.task.towers, clip.settings.sparse.losses) == (2, [])


def test_entropies_teach_the_modality_that_they_are_of(setup, model):
    batch = setup.objective.collate([setup.train[i] for i in range(8)])

    def of(loss, modality):
        with record(model) as decisions:
            model(**batch)
        (routing,) = decisions.values()
        (gradient,) = torch.autograd.grad(loss(routing), routing.logits)
        return gradient[routing.evidence.label == modality].norm()

    for loss in (LocalEntropy("captions"), GlobalEntropy("captions", 8.0)):
        assert of(loss, CAPTION) > 0
        assert of(loss, PICTURE) == 0


def test_one_tower_is_trained_saved_and_loaded(tmp_path):
    ended = moeify(
        "train", *TINY, "--task", "contrastive", "--recipe", "limoe", "--steps", 1, "--evaluations", 1, "--experts", 2,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert "global entropy of captions for 1 experts (weight 0.04)" in ended.out
    assert "captions use " in ended.out
    assert type(load(tmp_path / "run" / "model")).__name__ == "OneTower"
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"caption recall@1", "picture recall@5"} <= found["scores"].keys()


def test_what_one_tower_cannot_be_is_refused():
    with pytest.raises(ValueError, match="openai/clip has a tower for pictures and one for captions"):
        Contrastive(**SMALL, towers=1).prepare("openai/clip", None)
    with pytest.raises(ValueError, match="towers=3 is not known"):
        Contrastive(**SMALL, towers=3).prepare(None, None)
