import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.fields import Columns, NoField
from moeify.data.records import hold_out, inside, read_class_folders, read_records
from moeify.data.rows import read_table

ROWS = [{"path": f"{i}.wav", "label": str(i % 3), "note": "a, b"} for i in range(30)]


def table(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_a_table_has_the_named_columns_or_all(tmp_path, name):
    path = table(tmp_path / name)
    assert read_table(path, Columns()) == ROWS
    assert read_table(path, Columns(("label",), ("path", "speaker"))) == [
        {"path": row["path"], "label": row["label"]} for row in ROWS
    ]


def test_a_missing_column_a_missing_file_and_another_format_are_named(tmp_path):
    path = table(tmp_path / "rows.csv")
    with pytest.raises(NoField, match=r"rows.csv has no column 'digit'; it has: path, label, note"):
        read_table(path, Columns(("digit",)))
    with pytest.raises(ValueError, match=r"notes.txt holds no table; a table is one of .jsonl"):
        read_table(tmp_path / "notes.txt", Columns())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_table(tmp_path / "no.csv", Columns())
    (tmp_path / "bad.jsonl").write_text('{"label": 1}\n[2]\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is not an object"):
        read_table(tmp_path / "bad.jsonl", Columns(("label",)))


def test_a_folder_has_its_own_parts_and_its_test_part_is_not_read(tmp_path):
    for part, rows in (("train", ROWS[:20]), ("validation", ROWS[20:25]), ("test", ROWS[25:])):
        table(tmp_path / f"{part}.csv", rows)
    records = read_records(tmp_path, Columns())
    assert (records.train, records.validation, records.folder) == (ROWS[:20], ROWS[20:25], tmp_path)


def test_without_a_validation_part_a_tenth_of_the_keys_is_held_out(tmp_path):
    path = table(tmp_path / "train.csv", ROWS + ROWS)
    records = read_records(path, Columns(), key=lambda row: row["path"])
    assert len(records.validation) == 6
    assert not {row["path"] for row in records.train} & {row["path"] for row in records.validation}
    assert read_records(tmp_path, Columns(), key=lambda row: row["path"]) == records


def test_rows_of_another_source_are_all_held_out_even_if_there_is_one(tmp_path):
    path, other = table(tmp_path / "all.csv"), table(tmp_path / "other.csv", ROWS[:1])
    records = read_records(path, Columns(), validation=other)
    assert (records.train, records.validation) == (ROWS, ROWS[:1])


def test_folders_without_a_table_to_train_on_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no table named train\*; it has no table"):
        read_records(tmp_path, Columns())
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match="there is no row to train on"):
        read_records(tmp_path, Columns())
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_records(tmp_path / "nowhere", Columns())


@given(st.lists(st.integers(0, 20), min_size=2).filter(lambda keys: len(set(keys)) > 1))
def test_equal_keys_are_in_one_part_and_no_row_is_lost(keys):
    train, validation = hold_out(keys)
    assert train
    assert validation
    assert sorted(train + validation) == sorted(keys)
    assert not set(train) & set(validation)


def test_rows_of_one_key_cannot_be_split():
    with pytest.raises(ValueError, match="3 rows with 1 different keys cannot be split"):
        hold_out([1, 1, 1])


def test_paths_stay_inside_their_folder(tmp_path):
    assert inside(tmp_path, "a/../b.wav") == tmp_path.resolve() / "b.wav"
    with pytest.raises(ValueError, match="is not inside"):
        inside(tmp_path, "../b.wav")
    with pytest.raises(ValueError, match="is not inside"):
        inside(tmp_path, "/etc/passwd")


def test_a_folder_has_a_class_per_folder(tmp_path):
    for name in [f"{label}/{i}.WAV" for label in ("yes", "no") for i in range(10)] + ["no/deep/a.wav", "yes/note.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    records = read_class_folders(tmp_path, (".wav",))
    rows = records.train + records.validation
    assert (len(rows), len(records.validation)) == (21, 2)
    assert all(row["path"].startswith(row["label"] + "/") for row in rows)


def test_a_class_may_be_called_train(tmp_path):
    for label in ("train", "car"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").touch()
    records = read_class_folders(tmp_path, (".png",))
    assert {row["label"] for row in records.train + records.validation} == {"train", "car"}


def test_folders_of_parts_are_above_those_of_classes(tmp_path):
    for part in ("train", "val", "test"):
        (tmp_path / part / "yes").mkdir(parents=True)
        (tmp_path / part / "yes" / "a.wav").touch()
    records = read_class_folders(tmp_path, (".wav",))
    assert records.train == [{"path": "train/yes/a.wav", "label": "yes"}]
    assert records.validation == [{"path": "val/yes/a.wav", "label": "yes"}]
    with pytest.raises(ValueError, match=r"has no .png file in a folder of a class: CLASS/NAME.png"):
        read_class_folders(tmp_path, (".png",))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_class_folders(tmp_path / "nowhere", (".wav",))


def test_a_saved_data_set_has_classes_by_name_and_images_as_they_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    rows = [{"image": {"bytes": b"not decoded %d" % i, "path": None}, "kind": i % 2} for i in range(4)]
    parts = {part: datasets.Dataset.from_list(rows, features=features) for part in ("train", "validation", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    found = read_records(tmp_path / "set", Columns(("kind", "image")))
    assert [row["kind"] for row in found.train] == ["cat", "dog"] * 2
    assert found.validation[3]["image"]["bytes"] == b"not decoded 3"


def test_a_name_that_is_no_file_is_asked_for_at_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    parts = {part: datasets.Dataset.from_list([{"a": part}]) for part in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: datasets.DatasetDict(parts))
    found = read_records("some/set:small", Columns(("a",)))
    assert (found.train, found.validation) == ([{"a": "train"}], [{"a": "validation"}])
