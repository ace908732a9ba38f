"""The task `classify-text`: name the class of a text. The small model is a BERT that reads bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from moeify.data.corpus import build_corpus
from moeify.data.text import read_texts
from moeify.data.tokenizer import ByteTokenizer
from moeify.tasks.base import Setup, Shape, Task
from moeify.tasks.classify import Classes, Classification, LabelledSamples, groups, predictions
from moeify.tasks.models import load_dense, load_tokenizer, save_tokenizer
from moeify.tasks.rows import Row, read_parts, value_of

TRAIN, HELD_OUT = 4000, 200
"""The most excerpts of a domain of the default texts, in either part."""


@dataclass(frozen=True, kw_only=True)
class ClassifyText(Task):
    """Texts with a label each; without data, excerpts of the text of Python and torch, whose domain is to be named.

    Attributes:
        text: the field of a row that is the text, or messages; `a.b` is the field b inside a.
        label: the field that is the class.
        group: the field by which the report groups samples; without it the class, where there are few.
        validation: a file or folder of held-out rows; without it, those that the data hold out, or a tenth.
    """

    name: ClassVar[str] = "classify-text"
    text: str = "text"
    label: str = "label"
    group: str | None = None
    validation: str | None = None

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read and tokenize the texts."""
        train, validation = self._rows(data)
        tokenizer: Any = ByteTokenizer() if model is None else load_tokenizer(model)
        if getattr(tokenizer, "pad_token", "") is None:
            tokenizer.pad_token = tokenizer.eos_token
        source = data or "excerpts of the text that came with Python and torch"
        classes = Classes.of([row["label"] for row in train], source)
        parts = [self._samples(rows, tokenizer, classes, source) for rows in (train, validation)]
        objective = Classification(lambda samples: dict(tokenizer.pad(samples, return_tensors="pt")))
        return Setup(
            train=parts[0],
            validation=parts[1],
            objective=objective,
            build=lambda: (
                small_bert(self.shape, self.length, classes)
                if model is None
                else load_classifier(model, classes, tokenizer.pad_token_id)
            ),
            model=model or f"BERT of bytes from scratch {vars(self.shape)}",
            data=source,
            facts=facts(classes, train, validation),
            save=lambda folder: save_tokenizer(tokenizer, folder),
            answers=lambda trained: predictions(
                trained, parts[1], objective, classes, lambda i: " ".join(validation[i]["text"].split())[:60]
            ),
        )

    def _rows(self, data: str | None) -> tuple[list[Row], list[Row]]:
        if data is None:
            return default_texts(self.length)
        if Path(data).is_dir() and not any(path.is_file() for path in Path(data).iterdir()):
            texts = read_texts(data)
            train, held_out = (
                [{"text": text, "label": domain} for domain, several in part.items() for text in several]
                for part in (texts.train, texts.validation)
            )
            return train, held_out
        return read_parts(
            data, self.validation, {"text": self.text, "label": self.label}, {"group": self.group or "domain"}
        )

    def _samples(self, rows: Sequence[Row], tokenizer: Any, classes: Classes, source: str) -> LabelledSamples:
        ids = [tokens(tokenizer, value_of(row["text"], source), self.length) for row in rows]
        labels = [classes.number(row["label"], source) for row in rows]
        domains = groups(labels, classes, [row.get("group") for row in rows], Path(source).name)
        return LabelledSamples(ids, labels, domains, round(fmean(map(len, ids))), lambda each: {"input_ids": each})


def tokens(tokenizer: Any, text: str, length: int) -> list[int]:
    """The first tokens of a text, with those that the tokenizer puts around it; at least one."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(text)[:length] or [tokenizer.eos_token_id]
    return tokenizer(text, truncation=True, max_length=length)["input_ids"] or [tokenizer.eos_token_id]


def default_texts(length: int) -> tuple[list[Row], list[Row]]:
    """Excerpts of every domain of the default corpus, evenly taken, with the domain as their label."""
    corpus = build_corpus()
    return (
        [row for name, text in corpus.train.items() for row in excerpts(name, text, length, TRAIN)],
        [row for name, text in corpus.validation.items() for row in excerpts(name, text, length, HELD_OUT)],
    )


def excerpts(name: str, text: bytes, length: int, most: int) -> list[Row]:
    """Excerpts of a text of `length` bytes with its name as their label."""
    starts = range(0, len(text) - length, length)
    kept = starts[:: max(1, len(starts) // most)][:most]
    return [{"text": text[start : start + length].decode(errors="ignore"), "label": name} for start in kept]


def facts(classes: Classes, train: Sequence[Row], validation: Sequence[Row]) -> dict[str, str]:
    """The sizes of a set with classes, for the report."""
    often = Counter(str(row["label"]) for row in validation).most_common(1)[0][1]
    return {
        "classes": f"{len(classes.names)}; the most frequent one is {often / len(validation):.1%} of those held out",
        "samples": f"{len(train):,} to train on, {len(validation):,} held out",
    }


def small_bert(shape: Shape, length: int, classes: Classes) -> nn.Module:
    """A BERT from scratch that reads bytes, with a head for the classes."""
    config = BertConfig(
        vocab_size=ByteTokenizer.vocab_size, hidden_size=shape.width, intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=length,
        pad_token_id=ByteTokenizer.pad_token_id, **classes.config(),
    )  # fmt: skip
    return BertForSequenceClassification(config)


def load_classifier(model: str, classes: Classes, pad: int | None) -> nn.Module:
    """A model of transformers in fp32 with a head for the classes, a new one where its own has others."""
    loaded = load_dense(
        model, "AutoModelForSequenceClassification", dtype=torch.float32, ignore_mismatched_sizes=True,
        **classes.config(),
    )  # fmt: skip
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = pad
    return loaded
