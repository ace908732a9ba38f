"""Pairs of texts are learned: tags of languages, padding, scores, generation, and refusals in one line."""

from __future__ import annotations

import json

import pytest
import torch

from moeify.data.tagged import TaggedBytes, TaggedTokens
from moeify.tasks.base import Shape
from moeify.tasks.seq2seq import Seq2Seq, of_each_language, translated

SMALL = {"length": 16, "shape": Shape(width=16, layers=1, heads=2, hidden=32)}
ROWS = [{"source": f"{i}", "target": "x" * (i % 9 + 1), "language": "ab"[i % 2]} for i in range(40)]


def write(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_the_tag_of_the_language_is_the_first_token_of_both_sides(tmp_path):
    setup = Seq2Seq(**SMALL).prepare(None, write(tmp_path / "a.jsonl", ROWS))
    for i in range(len(setup.train)):
        sample, tag = setup.train[i], 258 + "ab".index(setup.train.domain_of(i))
        assert sample["input_ids"][0] == sample["labels"][0] == tag
        assert sample["input_ids"][-1] == sample["labels"][-1] == 256


def test_padding_counts_in_no_loss():
    setup = Seq2Seq(**SMALL).prepare(None, None)
    torch.manual_seed(0)
    model = setup.build().eval()
    samples = sorted((setup.train[i] for i in range(20)), key=lambda each: len(each["labels"]))[:: 19 // 2]
    collate, judge = setup.objective.collate, setup.objective.judge
    with torch.no_grad():
        together = judge(model, collate(samples)).losses
        alone = torch.cat([judge(model, collate([sample])).losses for sample in samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_token_accuracy_counts_tokens():
    objective = Seq2Seq(**SMALL).prepare(None, None).objective
    assert objective.scores([(torch.tensor(3), torch.tensor(4)), (torch.tensor(1), torch.tensor(4))]) == {
        "token accuracy": 0.5
    }


def test_rare_languages_are_translated_too(tmp_path):
    rows = [{"source": f"{i}", "target": "x", "language": "rare" if i % 20 == 0 else "common"} for i in range(400)]
    samples = Seq2Seq(**SMALL).prepare(None, write(tmp_path / "a.jsonl", rows)).train
    chosen = [samples.domain_of(i) for i in of_each_language(samples, 64)]
    assert chosen.count("common") == 32
    assert 8 <= chosen.count("rare") <= 20
    assert len(of_each_language(samples, 6)) == 6


def test_chrf_is_that_of_sacrebleu_for_all_and_for_each_language():
    pytest.importorskip("sacrebleu")
    setup = Seq2Seq(**SMALL | {"length": 64}).prepare(None, None)
    model = setup.build().eval()
    found = setup.objective.final_scores(model, setup.validation)
    rows, written = translated(model, setup.validation, setup.objective, 64)
    from sacrebleu import corpus_chrf

    assert found["chrF"] == corpus_chrf(written, [[row["target"] for row in rows]]).score
    assert set(found) == {"chrF", "chrF en", "chrF de", "chrF roman"}


def test_without_sacrebleu_a_line_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics.chrf", None)
    setup = Seq2Seq(**SMALL).prepare(None, None)
    assert setup.objective.final_scores(setup.build(), setup.validation) == {}
    assert "pip install 'moeify[translation]'" in "".join(capsys.readouterr())


def test_decoding_ends_at_the_end_of_text():
    tags = TaggedBytes(["a"])
    assert tags.decode([258, *b"hi", 256, *b"more"]) == "hi"
    assert tags.vocab_size == 259


class Words:
    """A tokenizer of words."""

    pad_token_id, eos_token_id, words = 0, 1, ["", "", "__fr__", "deu_Latn", "es:", "one", "un"]

    def __len__(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.words.index(word) for word in text.split()] + [1] * add_special_tokens}


def test_a_tokenizer_has_a_token_for_a_language_or_reads_its_name():
    tags = TaggedTokens(Words(), ["fr", "deu_Latn", "es"])
    assert (tags.source("one", "fr"), tags.target("un", "fr")) == ([5, 1], [2, 6, 1])
    assert tags.target("un", "deu_Latn") == [3, 6, 1]
    assert (tags.source("one", "es"), tags.target("un", "es")) == ([4, 5, 1], [6, 1])


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"source": "a", "goal": "b"}], {}, "has no column 'target'; it has: source, goal"),
        ([{"source": f"{i}", "target": " "} for i in range(4)], {}, "a target is a text, not ' '"),
        (ROWS, {"languages": "a,fr"}, "has no pair in fr; its languages are: a, b"),
        (
            [{"source": f"{i}", "target": "y" * 99} for i in range(4)],
            {},
            "no pair of at most 16 tokens; raise --length",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        Seq2Seq(**SMALL, **settings).prepare(None, write(tmp_path / "a.jsonl", rows))
