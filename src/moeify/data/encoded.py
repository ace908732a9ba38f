"""Turn the documents of texts into token ids, by part and domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.data.corpus import Corpus
from moeify.data.text import Texts
from moeify.data.tokenizer import Tokenizer
from moeify.progress import Progress

Encoded = dict[str, list[Int[Tensor, "_"]]]
"""domain -> the token ids of its documents, int32."""


def encoded(texts: Corpus | Texts, tokenizer: Tokenizer, length: int) -> tuple[Encoded, Encoded]:
    """Return the documents to train on and the held-out ones, each with the tokenizer's end of text, if it has one.

    Args:
        texts: the documents; the bytes of a domain are one.
        tokenizer: encodes them.
        length: tokens of a row that is to be cut from them.

    Raises:
        ValueError: no domain of a part has the tokens of a row.
    """
    return _part("train", texts.train, tokenizer, length), _part("validation", texts.validation, tokenizer, length)


def with_end(tokenizer: Tokenizer) -> Callable[[str], Int[Tensor, "_"]]:
    """A function from a document to its token ids, int32, which end in an end of text if the tokenizer has one."""
    eos = getattr(tokenizer, "eos_token_id", None)
    end = [] if eos is None else [eos]
    return lambda text: torch.tensor(tokenizer.encode(text) + end, dtype=torch.int32)


def _part(name: str, domains: Mapping[str, bytes | Sequence[str]], tokenizer: Tokenizer, length: int) -> Encoded:
    whole = {domain: [given.decode()] if isinstance(given, bytes) else given for domain, given in domains.items()}
    characters = sum(len(text) for documents in whole.values() for text in documents)
    progress, done = Progress(f"tokens of the {name} part", characters), 0
    encode = with_end(tokenizer)
    tokens: Encoded = {domain: [] for domain in whole}
    for domain, documents in whole.items():
        for text in documents:
            progress.at(done)
            tokens[domain].append(encode(text))
            done += len(text)
    longest = max((sum(map(len, documents)) for documents in tokens.values()), default=0)
    if longest < length:
        raise ValueError(
            f"the {name} part has {longest} tokens in its largest domain, too few for a row of {length}; "
            "give more text" + (f", or a length of at most {longest}" if longest else "")
        )
    return tokens
