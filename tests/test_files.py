"""Files are checked when they are read, and a crash while one is written leaves the old one."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from moeify import files
from moeify.files import (
    open_tensors,
    read_json,
    read_tensors,
    replacing,
    share_tensors,
    write_json,
    write_tensors,
    write_text,
)

TENSORS = {"b": torch.randn(2, 3), "a": torch.arange(4)}


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "new" / "x.json", {"né": [1, 2.5, None]})
    write_tensors(tmp_path / "new" / "x.safetensors", TENSORS)
    assert read_json(tmp_path / "new" / "x.json") == {"né": [1, 2.5, None]}
    read = read_tensors(tmp_path / "new" / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    with open_tensors(tmp_path / "new" / "x.safetensors") as opened:
        assert opened.get_slice("b").get_shape() == [2, 3]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.json", "x.safetensors"]


def test_text_is_utf8_whatever_the_locale(tmp_path):
    write_text(tmp_path / "x.txt", "naïve ∑\n")
    assert (tmp_path / "x.txt").read_bytes() == "naïve ∑\n".encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "is not valid JSON: it is nested more than 100 deep"),
        (b"[]", "must hold a mapping, not a list"),
    ],
)
def test_json_that_is_none_is_refused_by_name(content, words, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json {words}"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("read", [read_tensors, open_tensors])
@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:20], lambda b: b"\xff" * len(b)])
def test_tensors_that_are_none_are_refused_by_name(read, damage, tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged or not a safetensors file"):
        read(path)


def test_json_of_any_size_and_what_is_no_file_is_not_read(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": [[1]] * 3})
    assert read_json(tmp_path / "x.json") == {"a": [[1]] * 3}
    monkeypatch.setattr(files, "LARGEST_JSON", 5)
    with pytest.raises(ValueError, match=r"x\.json has .* bytes, and JSON of more than 5 is not read"):
        read_json(tmp_path / "x.json")
    (tmp_path / "y.json").mkdir()
    with pytest.raises(ValueError, match=r"y\.json is a folder, not a file"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ValueError, match=r"no file can be called .*z"):
        read_json(tmp_path / "z\0.json")


@pytest.mark.parametrize("read", [read_json, read_tensors, open_tensors])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no x\.json in "):
        read(tmp_path / "x.json")


def test_an_exception_leaves_the_old_file_and_nothing_beside(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(UnicodeEncodeError), replacing(tmp_path / "x.json") as new:
        new.write_text("half \ud800", encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"new": object()})
    assert read_json(tmp_path / "x.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    write_json(tmp_path / "x.json", {})
    assert events == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_windows_opens_no_folder(tmp_path, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(files.os, "open", lambda path, *flags: (opened.append(path), real(path, *flags))[1])
    monkeypatch.setattr(files.os, "name", "nt")
    files.sync(tmp_path)
    assert not opened


def test_a_full_disk_is_an_os_error(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_equal_tensors_give_equal_bytes(tmp_path):
    written = set()
    for names in (("a", "b"), ("b", "a")):
        write_tensors(tmp_path / "x.safetensors", {name: TENSORS[name] for name in names})
        written.add((tmp_path / "x.safetensors").read_bytes())
    assert len(written) == 1


def test_json_options_are_those_of_the_standard_library(tmp_path):
    write_json(tmp_path / "x.json", {"b": 1, "a": 2}, indent=None, sort_keys=True)
    assert (tmp_path / "x.json").read_text() == json.dumps({"a": 2, "b": 1}) + "\n"


def test_tensors_are_readable_by_those_who_can_read_other_files(tmp_path):
    write_text(tmp_path / "text", "")
    write_tensors(tmp_path / "tensors", {"a": torch.zeros(1)})
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode


def test_tensors_that_others_wrote_are_shared_too(tmp_path):
    write_text(tmp_path / "text", "")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    share_tensors(tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    assert len([*tmp_path.iterdir()]) == 2


def test_a_path_that_the_locale_cannot_decode_is_written_as_it_is(tmp_path):
    path = "données".encode().decode("ascii", "surrogateescape")  # as sys.argv has it under LC_ALL=C
    write_text(tmp_path / "report.html", f"trained on {path}")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "trained on données"
