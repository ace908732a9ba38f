import hashlib

import pytest

from moeify.data.claim_files import data_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    content = b"some rows"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_bytes(content)
    row = f"set/train.csv\t{len(content)}\t1\t{hashlib.sha256(content).hexdigest()}"
    (tmp_path / "MANIFEST.tsv").write_text(f"path\tbytes\trows\tsha256\n{row}\n")
    monkeypatch.setenv("MOEIFY_DATA", str(tmp_path))
    return tmp_path


def test_a_listed_file_is_found(folder):
    assert data_file("set/train.csv") == folder / "set" / "train.csv"


@pytest.mark.parametrize("content", [b"some rowz", b"some"])
def test_another_file_of_the_same_name_is_refused(folder, content):
    (folder / "set" / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"train.csv has {len(content)} bytes and sha256 .* not 9 and"):
        data_file("set/train.csv")


def test_a_file_is_hashed_once(folder):
    data_file("set/train.csv")
    (folder / "set" / "train.csv").write_bytes(b"changed meanwhile")
    assert data_file("set/train.csv").read_bytes() == b"changed meanwhile"


def test_an_unlisted_file_is_refused(folder):
    (folder / "set" / "other.csv").write_text("a")
    with pytest.raises(ValueError, match=r"set/other.csv is not listed in .*MANIFEST.tsv"):
        data_file("set/other.csv")


def test_a_missing_file_or_folder_says_what_to_set(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no set/none.csv .*; MOEIFY_DATA is"):
        data_file("set/none.csv")
    monkeypatch.delenv("MOEIFY_DATA")
    with pytest.raises(FileNotFoundError, match=r"set/train.csv is a file .*; set MOEIFY_DATA to"):
        data_file("set/train.csv")
