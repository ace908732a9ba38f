"""Tokens, padded batches and blocks of texts."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from moeify.data.blocks import Blocks, blocks
from moeify.data.corpus import Corpus
from moeify.data.text import Texts
from moeify.data.tokenizer import ByteTokenizer


@given(st.text())
def test_bytes_decode_to_what_was_encoded(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(token < 256 for token in tokenizer.encode(text))


def test_a_half_character_of_json_can_be_encoded():
    assert ByteTokenizer().encode(json.loads('"a\\ud800"')) == [97, ord("?")]


def test_decoding_replaces_what_is_not_utf8_and_leaves_out_special_tokens():
    assert ByteTokenizer().decode(torch.tensor([97, 0xFF, 98, 256, 257])) == "a\ufffdb"


def test_samples_are_padded_to_one_batch_as_collators_of_transformers_do():
    tokenizer = ByteTokenizer()
    samples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "task": 0}, {"input_ids": [4], "labels": [4], "task": 1}]
    batch = tokenizer.pad(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 257, 257]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["task"].tolist() == [0, 1]
    assert tokenizer.pad(samples, pad_to_multiple_of=8)["input_ids"].shape == (2, 8)
    assert tokenizer.pad(samples, "max_length", 5)["input_ids"].shape == (2, 5)
    with pytest.raises(ValueError, match="a sample of 3 tokens does not fit 2"):
        tokenizer.pad(samples, "max_length", 2)
    with pytest.raises(ValueError, match="choose padding 'longest'"):
        tokenizer.pad(samples, "left")
    causal = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    assert causal["labels"].tolist() == [[1, 2], [3, -100]]
    assert DataCollatorWithPadding(tokenizer)(samples).keys() == batch.keys()


@given(st.integers(1, 9), st.lists(st.integers(0, 50), min_size=1, max_size=4))
def test_blocks_are_the_streams_in_order_without_their_tails(length, sizes):
    streams = {str(i): torch.arange(size) + 100 * i for i, size in enumerate(sizes)}
    data = Blocks(streams, length)
    assert len(data) == sum(size // length for size in sizes)
    for name, stream in streams.items():
        own = [data[i]["input_ids"] for i in range(len(data)) if data.domain_of(i) == name]
        assert torch.equal(torch.cat([stream[:0], *own]), stream[: len(own) * length])
        assert len(stream) - len(own) * length < length


def test_a_model_is_given_ids_and_labels_alone():
    train, _ = blocks(Texts({"d": ["abcdefgh"]}, {"d": ["abcdefgh"]}), ByteTokenizer(), length=4)
    batch = next(iter(DataLoader(train, batch_size=2)))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].shape == (2, 4)


def test_every_document_ends_with_the_end_of_text():
    train, validation = blocks(Texts({"d": ["ab", "c"]}, {"d": ["xyz"]}), ByteTokenizer(), length=1)
    assert train.input_ids.flatten().tolist() == [97, 98, 256, 99, 256]
    assert validation.input_ids.flatten().tolist() == [120, 121, 122, 256]


def test_a_tokenizer_is_anything_that_encodes():
    class Words:
        def encode(self, text):
            return [len(word) for word in text.split()]

        def decode(self, token_ids):
            return " ".join("x" * i for i in token_ids)

    train, _ = blocks(Texts({"d": ["a bb ccc dddd"]}, {"d": ["a a"]}), Words(), length=2)
    assert train.input_ids.tolist() == [[1, 2], [3, 4]]


def test_a_corpus_becomes_blocks_of_its_domains():
    corpus = Corpus({"a": b"aaaa", "b": b"bbbbbbbb"}, {"a": b"AAAA", "b": b""}, sha256="", versions={}, skipped={})
    train, validation = blocks(corpus, ByteTokenizer(), length=4)
    assert [train.domain_of(i) for i in range(len(train))] == ["a", "b", "b"]
    assert train.domains == ("a", "b")
    assert ByteTokenizer().decode(validation[0]["input_ids"]) == "AAAA"


def test_a_part_too_small_for_a_block_says_how_long_a_block_could_be():
    with pytest.raises(ValueError, match=r"validation part has 4 tokens .* row of 8; .* length of at most 4"):
        blocks(Texts({"d": ["0123456789"]}, {"d": ["abc"]}), ByteTokenizer(), length=8)
    with pytest.raises(ValueError, match=r"train part has 0 tokens .* row of 2; give more text$"):
        blocks(Texts({"d": []}, {"d": ["abc"]}), ByteTokenizer(), length=2)
