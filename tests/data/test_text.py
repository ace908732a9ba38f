import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.blocks import blocks
from moeify.data.text import Texts, held_out, read_texts
from moeify.data.tokenizer import ByteTokenizer

ROWS = [{"text": f"document {i}", "domain": "even" if i % 2 == 0 else "odd"} for i in range(40)]


def jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def everything(texts: Texts) -> dict[str, list[str]]:
    return {domain: sorted(texts.train[domain] + texts.validation.get(domain, [])) for domain in texts.train}


# Sources


def test_a_text_file_is_a_domain_of_its_name_and_a_tenth_is_held_out(tmp_path):
    distinct = "".join(chr(0x4E00 + i) for i in range(2000))
    (tmp_path / "signs.txt").write_text(distinct, encoding="utf-8")
    texts = read_texts(str(tmp_path / "signs.txt"))
    assert len("".join(texts.validation["signs"])) == 200
    assert sorted("".join(texts.train["signs"] + texts.validation["signs"])) == sorted(distinct)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_give_a_document_per_row_and_a_domain_per_name(tmp_path, name):
    expected = {domain: sorted(r["text"] for r in ROWS if r["domain"] == domain) for domain in ("even", "odd")}
    assert everything(read_texts(jsonl(tmp_path / name, ROWS))) == expected


def test_rows_without_a_domain_belong_to_their_file(tmp_path):
    path = jsonl(tmp_path / "notes.jsonl", [{"text": "a"}, {"text": "b\u2028c", "domain": None}, {"text": " "}])
    assert everything(read_texts(path)) == {"notes": ["a", "b\u2028c"]}


def test_parquet_reads_like_json_lines(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert read_texts(tmp_path / "rows.parquet") == read_texts(jsonl(tmp_path / "rows.jsonl", ROWS))


def test_a_language_is_the_domain_of_rows_without_one(tmp_path):
    rows = [{"text": "a", "language": "fr"}, {"text": "b", "language": "de", "domain": "law"}, {"text": "c"}]
    found = read_texts(jsonl(tmp_path / "notes.jsonl", rows))
    assert set(found.train) | set(found.validation) == {"fr", "law", "notes"}


def test_a_folder_of_sources_has_a_domain_per_subfolder(tmp_path):
    for name in ("a/one.py", "a/deep/two.py", "b/three.c", "b/.git/config", "four.md", "a/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "init" in name else name)
    (tmp_path / "b" / "three.o").write_bytes(b"\x7fELF\0\xff")
    (tmp_path / "b" / "twice.c").write_text("other")
    texts = read_texts(tmp_path)
    assert set(texts.train) == {"a", "b", tmp_path.name}
    assert everything(texts)["a"] == ["a/deep/two.py", "a/one.py"]
    assert everything(texts)["b"] == ["b/three.c", "other"]


def test_a_folder_with_parts_keeps_them_and_never_reads_the_test_part(tmp_path):
    for part in ("train", "validation", "test"):
        jsonl(tmp_path / f"{part}.jsonl.gz", [{"text": part, "domain": "d"}])
    (tmp_path / "README.md").write_text("about this data set")
    assert read_texts(tmp_path) == Texts({"d": ["train"]}, {"d": ["validation"]})


def test_a_train_part_alone_is_split(tmp_path):
    jsonl(tmp_path / "train-00000.jsonl", ROWS[:20])
    jsonl(tmp_path / "train-00001.jsonl", ROWS[20:])
    assert read_texts(tmp_path) == read_texts(jsonl(tmp_path / "other" / "rows.jsonl", ROWS))


def test_a_data_set_of_the_hub_keeps_its_parts(monkeypatch):
    datasets = pytest.importorskip("datasets")
    parts = {part: datasets.Dataset.from_list([{"text": part}]) for part in ("train", "validation", "test")}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or datasets.DatasetDict(parts))
    assert read_texts("org/name:small") == Texts({"org/name": ["train"]}, {"org/name": ["validation"]})
    assert asked == [("org/name", "small")]


ENDINGS = {
    "rows.json": lambda rows: json.dumps(rows),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}),
    "lines.json": lambda rows: "\n".join(map(json.dumps, rows)),
    "rows.ndjson": lambda rows: "\n".join(map(json.dumps, rows)),
    "rows.JSONL": lambda rows: "\n".join(map(json.dumps, rows)),
    "rows.csv": lambda rows: table(rows, ","),
    "rows.TSV": lambda rows: table(rows, "\t"),
}


def table(rows: list, delimiter: str) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["text", "domain"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("name", [*ENDINGS, "rows.csv.gz", "rows.Json.GZ"])
def test_every_format_of_rows_is_read_as_rows(tmp_path, name):
    rows = [
        *ROWS,
        {"text": 'two lines\nand "quotes", commas', "domain": "odd"},
        {"text": "x" * 200_000, "domain": "odd"},
    ]
    make = ENDINGS.get(name) or ENDINGS[name.lower().removesuffix(".gz")]
    data = make(rows).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
    assert read_texts(tmp_path / name) == read_texts(jsonl(tmp_path / "other" / "rows.jsonl", rows))


def test_the_field_to_read_can_be_named(tmp_path):
    rows = [{"content": row["text"], "text_id": 1, "domain": row["domain"]} for row in ROWS]
    expected = read_texts(jsonl(tmp_path / "rows.jsonl", ROWS))
    assert read_texts(jsonl(tmp_path / "rows.jsonl", rows), field="content") == expected
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_texts(tmp_path / "rows.parquet", field="content") == expected


def test_messages_of_a_chat_are_joined(tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]},
    ]
    expected = ["human: Hi\n\ngpt: Hello.", "user: Hi\n\nassistant: Hello.", "user: What is it?"]
    assert everything(read_texts(jsonl(tmp_path / "c.jsonl", chats))) == {"c": expected}
    for messages in ("Hi", [{"role": "user"}], ["Hi"]):
        with pytest.raises(ValueError, match=r"c.jsonl, row 1: (messages are a list|a message is)"):
            read_texts(jsonl(tmp_path / "c.jsonl", [{"messages": messages}]))


def test_a_domain_may_be_the_number_0(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "a", "domain": 0}, {"text": "b", "domain": 0}, {"text": "c"}])
    assert set(read_texts(path).train) == {"0", "rows"}


@pytest.mark.parametrize("saved", ["Dataset", "DatasetDict"])
def test_what_save_to_disk_wrote_is_read_by_its_rows(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    parts = {"train": data, "validation": datasets.Dataset.from_list([{"text": "v", "domain": "even"}]), "test": data}
    (data if saved == "Dataset" else datasets.DatasetDict(parts)).save_to_disk(tmp_path / "saved")
    texts = read_texts(tmp_path / "saved")
    if saved == "Dataset":
        assert texts == read_texts(jsonl(tmp_path / "rows.jsonl", ROWS))
    else:
        assert texts.validation == {"even": ["v"]}
        assert sum(map(len, texts.train.values())) == len(ROWS)
    with pytest.raises(ValueError, match=r"saved.* is a data set that save_to_disk wrote; read it by itself"):
        read_texts(tmp_path)


def test_settings_in_json_are_no_texts_and_are_named(tmp_path, caplog):
    (tmp_path / "main.py").write_text("print(1)\nprint(2)\n")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "numbers.json").write_text("[1, 2]")
    texts = read_texts(tmp_path)
    assert everything(texts) == {tmp_path.name: sorted(texts.train[tmp_path.name] + texts.validation[tmp_path.name])}
    assert "".join(everything(texts)[tmp_path.name]).count("print") <= 2
    assert set(texts.skipped) == {"package.json", "numbers.json"}
    assert "not whole: numbers.json (" in caplog.text
    (tmp_path / "main.py").unlink()
    with pytest.raises(ValueError, match=r"is empty: .*; package.json was not read: .* has no field 'text'"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match=r"package.json, row 1 has no field 'text', it has: name"):
        read_texts(tmp_path / "package.json")


@pytest.mark.parametrize("name", ["eval.jsonl", "dev.jsonl", "Validation.JSONL", "heldout-0.jsonl"])
def test_what_is_named_as_held_out_is_held_out(tmp_path, name):
    jsonl(tmp_path / "train.jsonl", [{"text": "t", "domain": "d"}])
    jsonl(tmp_path / name, [{"text": "v", "domain": "d"}])
    assert read_texts(tmp_path) == Texts({"d": ["t"]}, {"d": ["v"]})


def test_parts_may_be_folders(tmp_path):
    for name in ("train/law/a.txt", "train/b.txt", "valid/law/c.txt", "test/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    texts = read_texts(tmp_path)
    assert texts.train == {"law": ["train/law/a.txt"], tmp_path.name: ["train/b.txt"]}
    assert texts.validation == {"law": ["valid/law/c.txt"]}


# What a source can get wrong


def test_a_missing_file_is_said_and_never_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    for source in (tmp_path / "none.txt", "elsewhere/none.jsonl", "none", "here/none"):
        with pytest.raises(FileNotFoundError, match=r"no file or folder .*none"):
            read_texts(source)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_):
        raise ConnectionError("could not reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"no file or folder org/name, .*: could not reach the hub$"):
        read_texts("org/name")


@pytest.mark.parametrize(("name", "missing"), [("x.parquet", "pyarrow"), (None, "datasets")])
def test_a_missing_library_names_the_extra(monkeypatch, tmp_path, name, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    source = "org/name" if name is None else jsonl(tmp_path / name, ROWS)
    with pytest.raises(ImportError, match=r"pip install 'moeify\[data\]'"):
        read_texts(source)


def test_rows_without_a_text_name_the_fields_seen(tmp_path):
    with pytest.raises(ValueError, match=r"no field 'text', it has: content, id"):
        read_texts(jsonl(tmp_path / "rows.jsonl", [{"content": "a", "id": 1}]))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"content": "a", "id": 1}]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"no field 'text', it has: content, id"):
        read_texts(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "is empty"),
        ("a.jsonl", b"", "is empty"),
        ("a.txt", b"abc\xff", r"is not UTF-8 \(at byte 3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b'["a"]', "line 1 is not an object"),
        ("a.jsonl", b'{"text": 1}', "row 1: the field 'text' is a int"),
        ("a.jsonl.gz", b"plain", "cannot be decompressed"),
        ("a.jsonl.gz", gzip.compress(b"abc", mtime=0)[:-9], "cannot be decompressed"),
        ("a.parquet", b"plain", "is not a parquet file"),
        ("a.json", b'{"text": "a"', "is not JSON"),
        ("a.json", b"3", "holds a int and no rows"),
        ("a.csv", b"content,id\na,1\n", "no field 'text', it has: content, id"),
        ("a.csv", b"text,id\na,b,1\n", "row 1 has not as many fields as the heading"),
        ("a.csv", b'text\n"a', "is not CSV"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a\\ud800"}', r"row 2: character 1 is half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "domain": "\\ud800"}', r"row 1: character 0 is half of a surrogate pair"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2 is nested too deeply"),
        ("a.json", b'[{"text": "]]"},\n' + b'{"x": ' * 100_000, "line 2 is nested too deeply"),
        ("a.jsonl", b'\n{"n": ' + b"1" * 5000 + b"}", "line 2 cannot be read .*5000 digits"),
        ("a.json", b'[{"n": 12},\n\n{"n": ' + b"1" * 5000 + b"}]", "line 3 cannot be read .*5000 digits"),
        (
            "a.jsonl",
            b'{"text": "a"}\nx\ny\n{"text": "a"}',
            "line 2 is not JSON.*; 2 of 4 rows are bad, and at",
        ),
    ],
)
def test_a_bad_file_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_texts(tmp_path / name)
    assert name in str(error.value)


def test_a_file_that_expands_to_far_more_than_text_does_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data.decompress.MAX_BYTES", 2**20)
    bomb = jsonl(tmp_path / "a.txt.gz", [])
    bomb.write_bytes(gzip.compress(b"a" * 2**21))
    with pytest.raises(ValueError, match=r"a.txt.gz of 2,\d+ bytes expands to more than 1,048,576 bytes; leave it out"):
        read_texts(bomb)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for dictionary in (True, False):  # one value for all rows, or one page of them
        table = arrow.Table.from_pylist([{"text": "a" * 2**13}] * 2**9)
        parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=dictionary, compression="gzip")
        with pytest.raises(ValueError, match=r"a.parquet of .* expands to more than 1,048,576 bytes; leave it out"):
            read_texts(tmp_path / "a.parquet")


BAD = ["x", "[1]", '{"text": 1}', '{"text": "a\\ud800"}', '{"other": 1}', "[" * 10_000, '{"n": ' + "1" * 5000 + "}"]


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_row_in_a_thousand_is_skipped_counted_and_reported(tmp_path, caplog, bad):
    lines = ['{"text": "a"}'] * 999
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines[:500], bad, *lines[500:]]))
    texts = read_texts(path)
    assert everything(texts) == {"rows": ["a"] * 999}
    why = r"1 of 1,000 rows were skipped; the first: .*rows.jsonl, (line|row) 501"
    assert re.match(why, texts.skipped["rows.jsonl"])
    assert "not read, or not whole: rows.jsonl (1 of 1,000 rows" in caplog.text
    path.write_text("\n".join([*lines, bad, bad]))
    with pytest.raises(ValueError, match=r"rows.jsonl.* (line|row) 1000.*; 2 of 1,001 rows are bad"):
        read_texts(tmp_path)


def test_a_bad_row_of_a_table_is_skipped_too(tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.data.rows.MIN_ROWS_PER_BAD_ROW", 2)
    (tmp_path / "rows.csv").write_text("text,id\na,1\na,b,1\n")
    (tmp_path / "rows.json").write_text('[{"text": "a"}, 3]')
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = arrow.StringArray.from_buffers(2, *arrow.array([b"a", b"\xff"]).buffers()[1:])
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "rows.parquet")
    texts = read_texts(tmp_path)
    assert everything(texts) == {tmp_path.name: ["a", "a", "a"]}
    assert {name: why[:25] for name, why in texts.skipped.items()} == dict.fromkeys(
        ("rows.csv", "rows.json", "rows.parquet"), "1 of 2 rows were skipped;"
    )


@pytest.mark.parametrize("folder", [True, False])
def test_a_long_read_says_how_long_it_will_go_on(tmp_path, monkeypatch, capsys, folder):
    seconds = iter(range(10**6))
    monkeypatch.setattr("moeify.progress.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    path = jsonl(tmp_path / "rows.jsonl", [{"text": f"document {i:02}"} for i in range(40)])
    texts = read_texts(tmp_path if folder else path)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"reading {tmp_path.name if folder else path.name}: 2\d %, about 3\d s left", said[0])
    assert len(said) == 4
    blocks(texts, ByteTokenizer(), 4)
    assert re.fullmatch(
        r"tokens of the train part: 2\d %, about [23]\d s left", capsys.readouterr().out.splitlines()[0]
    )


# Holding out


@given(st.lists(st.text(min_size=1), min_size=2, max_size=60))
def test_no_document_is_in_both_parts_and_none_is_lost(documents):
    texts = held_out({"d": documents})
    validation = texts.validation.get("d", [])
    assert sorted(texts.train["d"] + validation) == sorted(documents)
    assert not set(texts.train["d"]) & set(validation)
    assert texts.train["d"]
    assert bool(validation) == (len(set(documents)) > 1)


def test_copies_of_one_document_do_not_take_a_domain_to_the_held_out_part():
    for rest in (["b"], ["b", "c"]):
        texts = held_out({"d": ["a"] * 98 + rest})
        assert texts.train["d"].count("a") == 98
        assert set(texts.validation["d"]) <= set(rest)
    assert held_out({"d": ["same"] * 30}) == Texts({"d": ["same"] * 30}, {})


@given(st.permutations([f"document {i}" for i in range(30)]))
def test_the_order_of_documents_does_not_decide_what_is_held_out(documents):
    assert len(held_out({"d": documents}).validation["d"]) == 3
    assert set(held_out({"d": documents}).validation["d"]) == set(held_out({"d": sorted(documents)}).validation["d"])


# Tokens and blocks
