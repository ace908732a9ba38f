import dataclasses
import re

import pytest
import torch

from moeify.data import corpus as module
from moeify.data.corpus import Corpus, build_corpus


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus(cap=200_000)


def test_a_corpus_needs_nothing_but_python_and_torch(corpus):
    assert {"py-stdlib", "py-torch", "cpp-headers", "typing-stubs", "english-docs"} <= set(corpus.train)
    assert corpus.versions["torch"] == torch.__version__


def test_every_domain_is_there_or_has_a_reason_not_to_be(corpus):
    assert set(corpus.train) | set(corpus.skipped) == {
        *("py-stdlib", "py-tests", "py-torch", "cpp-headers", "typing-stubs", "english-docs", "licences")
    }
    assert not set(corpus.train) & set(corpus.skipped)
    assert set(corpus.train) == set(corpus.validation)


def test_each_domain_stays_within_its_cap_and_a_tenth_of_it_is_held_out(corpus):
    for domain in corpus.train:
        assert 100_000 < len(corpus.train[domain]) + len(corpus.validation[domain]) <= 200_000
        assert 0 < len(corpus.validation[domain]) <= 20_000


def test_the_same_machine_gives_the_same_corpus(corpus):
    assert build_corpus(cap=200_000) == corpus


def test_the_hash_sees_every_byte(corpus):
    changed = corpus.train | {"py-torch": corpus.train["py-torch"].replace(b"a", b"b", 1)}
    assert module._sha256(corpus.train, corpus.validation) == corpus.sha256
    assert module._sha256(changed, corpus.validation) != corpus.sha256


def test_every_part_is_utf8(corpus):
    for text in (*corpus.train.values(), *corpus.validation.values()):
        text.decode()


def test_docstrings_of_a_held_out_file_are_held_out_with_it():
    domains = module._domains()
    code = {key for key, _ in domains["py-stdlib"]}
    prose = {key for key, _ in domains["english-docs"] if not key.startswith("topics/")}
    assert code == prose


def test_a_small_domain_is_skipped_and_named(monkeypatch):
    small = [(f"{name}.py", f"# {name}\n".encode) for name in range(100)]
    monkeypatch.setattr(module, "_domains", lambda: {"small": small})
    corpus = build_corpus()
    assert not corpus.train
    assert re.fullmatch(r"\d+ bytes on this machine, fewer than 100,000", corpus.skipped["small"])
    assert f"skipped small: {corpus.skipped['small']}" in str(corpus)


def test_files_are_held_out_as_a_whole_and_equal_files_are_taken_once(monkeypatch):
    files = [(str(name), f"text {name // 2}".encode) for name in range(1000)]
    monkeypatch.setattr(module, "_domains", lambda: {"files": files})
    monkeypatch.setattr(module, "MINIMUM", 0)
    corpus = build_corpus()
    train, validation = (part["files"].splitlines() for part in (corpus.train, corpus.validation))
    assert sorted(train + validation) == sorted(f"text {name}".encode() for name in range(500))
    assert 25 < len(validation) < 75


def test_reading_stops_at_the_cap():
    def read() -> bytes:
        nonlocal count
        count += 1
        return f"{count}".zfill(99).encode()

    count = 0
    train, validation = module._read(((str(name), read) for name in range(100_000)), cap=10_000)
    assert (len(train), len(validation)) == (9_000, 1_000)
    assert count < 300


def test_a_corpus_cannot_be_changed(corpus):
    with pytest.raises(dataclasses.FrozenInstanceError):
        corpus.sha256 = ""
