"""Batches of text excerpts, equally many from every domain, on which a trained model is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch

from moeify.data.corpus import Corpus
from moeify.data.text import Texts
from moeify.data.tokenizer import Tokenizer


def excerpts(
    texts: Corpus | Texts, tokenizer: Tokenizer, tokens: int, *, length: int = 128, batch: int = 8
) -> list[dict[str, Any]]:
    """Batches with `input_ids` (B, N) and the `domain` of each row, of about `tokens` tokens, held-out texts first.

    Every domain gives as many as the others, as far as it has them, and no more of it is tokenized. A domain with less
    text than one excerpt gives a shorter one.

    Args:
        texts: what was read.
        tokenizer: of the model.
        tokens: how many, of all domains together; there may be one excerpt of each more.
        length: N.
        batch: B at most.

    Raises:
        ValueError: there is no text.
    """
    domains = dict.fromkeys([*texts.validation, *texts.train])
    rows: list[list[list[int]]] = []
    for domain in domains:
        documents = chain(_documents(texts.validation, domain), _documents(texts.train, domain))
        stream = _stream(documents, tokenizer, -(-tokens // len(domains) // length) * length)
        cut = [stream[start : start + length] for start in range(0, len(stream), length)]
        rows.append(cut if len(cut) == 1 else [row for row in cut if len(row) == length])
    turns = zip_longest(*rows)
    named = [(name, row) for turn in turns for name, row in zip(domains, turn, strict=True) if row]
    if not named:
        raise ValueError("there is no text to read; give more than white space")
    return [_batch(part) for same in _by_length(named) for part in _chunks(same, batch)]


def _documents(part: Mapping[str, bytes | Sequence[str]], domain: str) -> Iterable[str]:
    found = part.get(domain, ())
    return [found.decode()] if isinstance(found, bytes) else found


def _stream(documents: Iterable[str], tokenizer: Tokenizer, size: int) -> list[int]:
    """At most `size` tokens; an end of text follows each document, where the tokenizer has one."""
    end = getattr(tokenizer, "eos_token_id", None)
    found: list[int] = []
    for text in documents:
        for start in range(0, len(text), 2**16):  # of a long document no more than is needed
            found += tokenizer.encode(text[start : start + 2**16])
            if len(found) >= size:
                return found[:size]
        found += [] if end is None else [end]
    return found[:size]


def _by_length(named: list[tuple[str, list[int]]]) -> list[list[tuple[str, list[int]]]]:
    found: dict[int, list[tuple[str, list[int]]]] = {}
    for name, row in named:
        found.setdefault(len(row), []).append((name, row))
    return list(found.values())


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _batch(part: list[tuple[str, list[int]]]) -> dict[str, Any]:
    return {"input_ids": torch.tensor([row for _, row in part]), "domain": [name for name, _ in part]}
