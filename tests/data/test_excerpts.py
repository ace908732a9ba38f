"""Excerpts of texts: as many tokens of every domain, and no more is tokenized than is needed."""

from __future__ import annotations

import pytest

from moeify.data import ByteTokenizer, Texts
from moeify.data.excerpts import excerpts


def test_every_domain_gives_as_many_held_out_texts_first():
    texts = Texts({"a": ["x" * 40], "b": ["y" * 40]}, {"a": ["X" * 3]})
    batches = excerpts(texts, ByteTokenizer(), 32, length=8, batch=3)
    assert [batch["domain"] for batch in batches] == [["a", "b", "a"], ["b"]]
    assert bytes(batches[0]["input_ids"][0, :3].tolist()) == b"XXX"
    assert batches[0]["input_ids"][0, 3] == ByteTokenizer.eos_token_id
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(3, 8), (1, 8)}


def test_a_short_domain_gives_a_shorter_excerpt():
    batches = excerpts(Texts({"a": ["x" * 40], "b": ["yy"]}), ByteTokenizer(), 16, length=8)
    assert [(batch["domain"], batch["input_ids"].shape[1]) for batch in batches] == [(["a"], 8), (["b"], 3)]


def test_no_more_is_tokenized_than_is_needed():
    class Counting(ByteTokenizer):
        seen = 0

        def encode(self, text):
            self.seen += len(text)
            return super().encode(text)

    counting = Counting()
    excerpts(Texts({"a": ["x" * 10] * 1000}), counting, 64, length=8)
    assert counting.seen <= 80


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="there is no text to read"):
        excerpts(Texts({"a": [""]}), type("NoEnd", (ByteTokenizer,), {"eos_token_id": None})(), 8)
