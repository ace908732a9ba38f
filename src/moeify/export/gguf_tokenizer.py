"""Tokenizers in GGUF files: a `tokenizer.json` translated to the keys of llama.cpp."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.export.model_spec import Unsupported
from moeify.files import read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    None: "gpt-2",  # the pattern of ByteLevel itself
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}
"""The regular expressions of pre-tokenizers, and llama.cpp's names of them."""


@dataclass(frozen=True)
class GgufTokenizer:
    """The tokens and merges of a tokenizer.

    Attributes:
        model: `llama` (SentencePiece's merges, bytes as tokens), or `gpt2` (merges of bytes).
        pre: llama.cpp's name of the pre-tokenizer, which cuts texts into words.
        tokens: in order.
        types: of tokens, as llama.cpp numbers them.
        scores: of tokens; the merges of `llama` with the highest come first.
        merges: of `gpt2`.
        add_space_prefix: whether texts begin with a space.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None

    def write(self, writer: Any, folder: Path) -> None:
        """Write it with a `GGUFWriter`; special tokens and the chat template are read from the folder."""
        import gguf

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates for pairs, which no one uses
        gguf.SpecialVocab(folder, n_vocab=len(self.tokens)).add_to_gguf(writer)


def read_tokenizer(folder: Path, vocabulary: int) -> GgufTokenizer | None:
    """The tokenizer of a folder, None if there is none.

    Args:
        folder: where `tokenizer.json` is.
        vocabulary: V of the model; tokens that only the model has are marked as unused.

    Raises:
        Unsupported: llama.cpp does not support the tokenizer.
    """
    if not (folder / "tokenizer.json").is_file():
        if any(folder.glob("tokenizer*")):
            raise Unsupported("its tokenizer has no tokenizer.json; save it as a fast tokenizer of transformers")
        return None
    values = read_json(folder / "tokenizer.json")
    model = values["model"]
    if model.get("type") != "BPE":
        raise Unsupported(
            f"its tokenizer is a {model.get('type')}, and only BPE has the same tokens in llama.cpp; leave out the "
            "tokenizer (tokenizer=None), and give token ids"
        )
    tokens, types = _tokens(values, vocabulary)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        scores = [-float(ranks.get(token, 0)) for token in tokens]
        parts = _parts(values["normalizer"], "normalizers") + _parts(values["pre_tokenizer"], "pretokenizers")
        prefix = any(part["type"] == "Prepend" or part.get("prepend_scheme") in ("first", "always") for part in parts)
        return GgufTokenizer("llama", "default", tokens, types, scores=scores, add_space_prefix=prefix)
    joined = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]
    return GgufTokenizer("gpt2", _words(values["pre_tokenizer"]), tokens, types, merges=joined)


def _tokens(values: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token and its type."""
    model, unknown = values["model"], values["model"].get("unk_token")
    added = {token["id"]: token for token in values["added_tokens"]}
    names = {number: token for token, number in model["vocab"].items()} | {
        number: token["content"] for number, token in added.items()
    }
    if max(names) >= vocabulary:
        raise Unsupported(f"its tokenizer has {max(names) + 1} tokens, the model {vocabulary}")
    tokens, types = [], []
    for number in range(vocabulary):
        token = names.get(number)
        if token is None:
            kind = _UNUSED
        elif token == unknown:
            kind = _UNKNOWN
        elif number in added:
            kind = _CONTROL if added[number]["special"] else _USER_DEFINED
        else:
            kind = _BYTE if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") else _NORMAL
        tokens.append(f"[PAD{number}]" if token is None else token)
        types.append(kind)
    return tokens, types


def _words(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    parts = _parts(pre_tokenizer, "pretokenizers")
    pattern = next((part["pattern"].get("Regex") for part in parts if part["type"] == "Split"), None)
    known = {"Split", "ByteLevel"}
    if pattern not in PATTERNS or {part["type"] for part in parts} - known or not parts:
        raise Unsupported(
            f"llama.cpp has no pre-tokenizer that splits words by {json.dumps(pattern or parts)}; leave out the "
            "tokenizer "
            "(tokenizer=None), and give token ids"
        )
    return PATTERNS[pattern]


def _parts(thing: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if thing is None:
        return []
    return thing[several] if thing["type"] == "Sequence" else [thing]
