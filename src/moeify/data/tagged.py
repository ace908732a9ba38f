"""Tokens of texts in several languages, whose first token is a tag for the language to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.data.tokenizer import ByteTokenizer
from moeify.files import write_json


class Tagged(ABC):
    """Makes tokens of a text and of the language to write.

    Attributes:
        pad: the token of padding.
        end: the token at the end of a text.
        vocab_size: tokens, tags included.
    """

    pad: int
    end: int
    vocab_size: int

    @abstractmethod
    def source(self, text: str, language: str) -> list[int]:
        """The tokens that an encoder reads of a text to be written in a language."""

    @abstractmethod
    def target(self, text: str, language: str) -> list[int]:
        """The tokens that a decoder is to write."""

    @abstractmethod
    def begin(self, model: Any, languages: Sequence[str]) -> Int[Tensor, "B P"]:
        """What the decoder is given to begin with, for each of several texts."""

    @abstractmethod
    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without tags."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Put it beside a model."""


class TaggedBytes(Tagged):
    """One token per byte, the end of text, padding, and one tag per language, the first token of source and target.

    Args:
        languages: their names.
    """

    pad, end = ByteTokenizer.pad_token_id, ByteTokenizer.eos_token_id

    def __init__(self, languages: Sequence[str]) -> None:
        self.languages = list(languages)
        self.bytes = ByteTokenizer()
        self.vocab_size = ByteTokenizer.vocab_size + len(self.languages)

    def source(self, text: str, language: str) -> list[int]:
        """Tag, bytes and end of text."""
        return [self._tag(language), *self.bytes.encode(text), self.end]

    def target(self, text: str, language: str) -> list[int]:
        """Tag, bytes and end of text."""
        return self.source(text, language)

    def begin(self, model: Any, languages: Sequence[str]) -> Int[Tensor, "B P"]:
        """The token that decoders start from, and the tag."""
        start = model.config.decoder_start_token_id
        return torch.tensor([[start, self._tag(language)] for language in languages])

    def _tag(self, language: str) -> int:
        if language not in self.languages:
            raise ValueError(f"no training pair is in {language!r}; the languages are: {', '.join(self.languages)}")
        return ByteTokenizer.vocab_size + self.languages.index(language)

    def decode(self, tokens: list[int]) -> str:
        """The text up to the first end of text."""
        return self.bytes.decode(tokens[: tokens.index(self.end)] if self.end in tokens else tokens)

    def save(self, folder: Path) -> None:
        """Write the names of the languages, in the order of their tags."""
        write_json(folder / "tokenizer.moeify.json", {"tokenizer": "bytes", "languages": self.languages})


class TaggedTokens(Tagged):
    """Tokens of a tokenizer of transformers; the tag is its token for a language, or else the language in words.

    NLLB has tokens such as `fra_Latn`, M2M100 such as `__fr__`; T5 has none, and reads `fr: ` before the source.

    Args:
        tokenizer: of transformers.
        languages: their names.
    """

    def __init__(self, tokenizer: Any, languages: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.pad, self.end, self.vocab_size = tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)
        self.tags = {language: self._token(language) for language in languages}

    def _token(self, language: str) -> int | None:
        vocabulary = self.tokenizer.get_vocab()
        return next((vocabulary[name] for name in (language, f"__{language}__") if name in vocabulary), None)

    def source(self, text: str, language: str) -> list[int]:
        """As the tokenizer encodes it, after the language in words where it has no token."""
        return self.tokenizer(text if self.tags.get(language) is not None else f"{language}: {text}")["input_ids"]

    def target(self, text: str, language: str) -> list[int]:
        """The tag if there is one, the text and its end."""
        tag = self.tags.get(language)
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*([] if tag is None else [tag]), *tokens, self.end]

    def begin(self, model: Any, languages: Sequence[str]) -> Int[Tensor, "B P"]:
        """The token that decoders start from, and the tag if every language has one."""
        start, tags = model.config.decoder_start_token_id, [self.tags.get(language) for language in languages]
        return torch.tensor([[start] if None in tags else [start, tag] for tag in tags])

    def decode(self, tokens: list[int]) -> str:
        """The text without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save_pretrained(folder)
