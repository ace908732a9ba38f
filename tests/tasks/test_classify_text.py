"""Texts are classified from rows, nested fields, chats and folders; what does not fit is said in one line."""

from __future__ import annotations

import json

import pytest

from moeify.tasks.base import Shape
from moeify.tasks.classify_text import ClassifyText

SMALL = {"length": 16, "shape": Shape(width=16, layers=1, heads=2, hidden=32)}
ROWS = [{"text": f"{word} {i}", "label": word} for word in ("yes", "no") for i in range(20)]


def write(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def prepare(data, **settings):
    return ClassifyText(**SMALL, **settings).prepare(None, data)


def test_labels_are_numbered_by_name_and_grouped_by_class(tmp_path):
    setup = prepare(write(tmp_path / "a.jsonl", ROWS))
    assert setup.build().config.id2label == {0: "no", 1: "yes"}
    for part in (setup.train, setup.validation):
        assert {part.domain_of(i): part[i]["labels"].item() for i in range(len(part))} == {"no": 0, "yes": 1}
    assert len(setup.train) + len(setup.validation) == 40


def test_fields_may_be_nested_and_texts_may_be_chats(tmp_path):
    rows = [
        {"chat": {"messages": [{"role": "user", "content": row["text"]}]}, "meta": {"class": row["label"]}}
        for row in ROWS
    ]
    setup = prepare(write(tmp_path / "a.jsonl", rows), text="chat.messages", label="meta.class")
    assert bytes(setup.train[0]["input_ids"]).startswith(b"user: yes")


def test_held_out_rows_may_be_another_file(tmp_path):
    held_out = write(tmp_path / "held.jsonl", ROWS[:3] + ROWS[-3:])
    setup = prepare(write(tmp_path / "a.jsonl", ROWS), validation=held_out)
    assert (len(setup.train), len(setup.validation)) == (40, 6)


def test_a_folder_of_texts_has_a_class_for_each_of_its_folders(tmp_path):
    for name in ("code", "prose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("\n".join(f"{name} {i}" for i in range(200)))
    assert prepare(str(tmp_path)).build().config.id2label == {0: "code", 1: "prose"}


def test_a_batch_is_padded_and_marked(tmp_path):
    setup = prepare(write(tmp_path / "a.jsonl", ROWS))
    batch = setup.objective.collate([{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [4], "labels": 1}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS, {"label": "intent"}, "has no column 'intent'; it has: text, label"),
        (
            [{"text": f"{i}", "label": {"x": 1}} for i in range(9)],
            {"label": "label.y"},
            "no field 'label.y'; at 'y' it has x",
        ),
        (ROWS[:20], {}, "one class, 'yes', and nothing to tell apart"),
        ([{"text": f"{i}", "label": i / 2} for i in range(30)], {}, "a label is a name or a whole number, not"),
        ([{"text": f"{i}", "label": i} for i in range(30)], {}, "is in no training sample"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        prepare(write(tmp_path / "a.jsonl", rows), **settings)
