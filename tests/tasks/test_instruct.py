"""Instructions are answered: what is learned, clusters for MoCLE, chats, right answers, and refusals in one line."""

from __future__ import annotations

import json

import pytest
import torch

from command_line import TINY, moeify
from moeify.cli.train import Train
from moeify.compose import Clusters
from moeify.data.synthetic import errands
from moeify.store import load
from moeify.tasks.base import Shape
from moeify.tasks.instruct import Instruct
from moeify.train import trainable

SMALL = {"length": 48, "shape": Shape(width=16, layers=1, heads=2, hidden=32)}


def write(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_errands_are_different_and_right():
    made = errands(300, seed=0)
    assert len({row["instruction"] for row in made}) == 300
    for row in made:
        words = row["instruction"].rstrip(".?").split()
        if row["group"] == "sum":
            assert int(row["answer"]) == int(words[1]) + int(words[3])
        if row["group"] == "backwards":
            assert row["answer"] == words[1][::-1]
        if row["group"] == "capitals":
            assert row["answer"] == words[1].upper()


def test_only_the_answer_and_its_end_are_learned(tmp_path):
    rows = [{"instruction": f"say {i}", "answer": "x" * (i + 1)} for i in range(20)]
    setup = Instruct(**SMALL).prepare(None, write(tmp_path / "a.jsonl", rows))
    for i in range(len(setup.train)):
        sample = setup.train[i]
        learned = [label for label in sample["labels"] if label != -100]
        assert bytes(learned[:-1]) == b"x" * (len(learned) - 1)
        assert learned[-1] == 256
        assert sample["labels"][-len(learned) :] == sample["input_ids"][-len(learned) :]


def test_the_last_message_of_a_chat_is_the_answer(tmp_path):
    def chat(*turns):
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    rows = [chat(("user", f"say {i}"), ("assistant", f"{i}")) for i in range(19)]
    rows.insert(0, chat(("system", "be brief"), ("user", "say hi"), ("assistant", "hi")))
    setup = Instruct(**SMALL).prepare(None, write(tmp_path / "a.jsonl", rows))
    samples = [part[i] for part in (setup.train, setup.validation) for i in range(len(part))]
    texts = {bytes(i for i in sample["input_ids"] if i < 256).decode() for sample in samples}
    assert texts == {"system: be brief\n\nuser: say hi\nhi", *(f"say {i}\n{i}" for i in range(19))}
    wrong = write(tmp_path / "b.jsonl", [chat(("assistant", f"{i}"), ("user", "b")) for i in range(20)])
    with pytest.raises(ValueError, match="the last message of a chat is the assistant's, not of 'user'"):
        Instruct(**SMALL).prepare(None, wrong)


def test_padding_counts_in_no_loss_and_a_right_answer_is_an_exact_match():
    setup = Instruct(**SMALL).prepare(None, None)
    torch.manual_seed(0)
    model = setup.build().eval()
    samples = sorted((setup.train[i] for i in range(20)), key=lambda each: len(each["labels"]))[:: 19 // 2]
    collate, judge = setup.objective.collate, setup.objective.judge
    with torch.no_grad():
        together = judge(model, collate(samples))
        alone = torch.cat([judge(model, collate([sample])).losses for sample in samples])
    torch.testing.assert_close(together.losses, alone, atol=1e-5, rtol=1e-5)
    assert setup.objective.scores([together.answers])["exact match"] == 0
    batch = collate(samples)
    sure = torch.nn.functional.one_hot(batch["labels"].clamp_min(0).roll(-1, 1), 258) * 50.0
    oracle = torch.nn.Module()
    oracle.forward = lambda **given: type("Output", (), {"logits": sure})
    assert setup.objective.scores([judge(oracle, batch).answers]) == pytest.approx({"perplexity": 1, "exact match": 1})


def test_mocle_in_one_command_clusters_trains_evaluates_and_keeps_the_clusters(tmp_path):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    ended = moeify(
        "train", *TINY, "--task", "instruct", "--recipe", "mocle", "--set", "clusters=6", "--length", 48, "--steps", 1,
        "--evaluations", 1, "--output", run,
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert "clusters: 6 of instructions" in ended.out
    assert len(Clusters.load(run / "model")) == 6
    load(run / "model")
    assert {"perplexity", "exact match"} <= json.loads((run / "summary.json").read_text())["scores"].keys()


def test_clusters_tell_kinds_of_instructions_apart():
    pytest.importorskip("sklearn")
    setup = Instruct(**SMALL, clusters=6).prepare(None, None)
    of = {(setup.train.domain_of(i), setup.train[i]["cluster"]) for i in range(len(setup.train))}
    assert len(of) == 6  # one for each of the six kinds


def test_of_a_model_only_low_rank_experts_and_their_routers_learn(tmp_path, monkeypatch):
    given = {"task": "instruct", "recipe": "mocle", "output": tmp_path, "settings": ["clusters=6"]}
    assert Train(**given, model="org/name").job().settings.freeze == ("base",)
    assert Train(**given, model="org/name", freeze=["norms"]).job().settings.freeze == ("norms",)
    assert Train(**given).job().settings.freeze == ()
    assert Train(task="instruct", recipe="mixtral", model="org/name", output=tmp_path).job().settings.freeze == ()


def test_frozen_parts_of_the_sparse_model_do_not_learn(tmp_path):
    from moeify.evaluate.run import Settings
    from moeify.evaluate.versus import versus
    from moeify.sparsify import recipes

    setup = Instruct(**SMALL).prepare(None, None)
    models = {}
    settings = Settings(steps=1, batch=2, evaluations=1, evaluation_blocks=2, pairs=0, freeze=("attention",))
    versus(
        setup.build, recipes["mixtral"], setup.train, setup.validation, tmp_path, settings, objective=setup.objective,
        on_model=models.__setitem__, log=lambda line: None,
    )  # fmt: skip
    assert trainable(models["sparse"])["attention"].trained == 0
    assert trainable(models["sparse"])["experts"].share == 1
    assert all(p.requires_grad for p in models["dense"].parameters())


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="clusters=65 are more than the 64"):
        Train(task="instruct", recipe="mocle", settings=["clusters=65"], output=tmp_path).job()
    rows = [{"instruction": f"{i}" * 60, "answer": "b"} for i in range(20)]
    with pytest.raises(ValueError, match="no instruction and answer of at most 48 tokens; raise --length"):
        Instruct(**SMALL).prepare(None, write(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match="has no column 'instruction'"):
        Instruct(**SMALL).prepare(
            None, write(tmp_path / "b.jsonl", [{"input": f"{i}", "target": "b"} for i in range(20)])
        )
    with pytest.raises(ValueError, match="an answer is a text, not 3"):
        Instruct(**SMALL).prepare(
            None, write(tmp_path / "c.jsonl", [{"instruction": f"{i}", "answer": 3} for i in range(20)])
        )
