"""Documents packed into full rows whose tokens see their own document only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from moeify.data.corpus import Corpus
from moeify.data.encoded import Encoded, encoded, with_end
from moeify.data.text import Texts
from moeify.data.tokenizer import Tokenizer


class Packed(Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens, cut from documents that were laid end to end, without padding.

    A document that does not fit goes on in the next row, as a document of its own. `position_ids` start again with
    every document, by which attention of transformers, routers, losses and memories keep documents apart; the model is
    to be called without a cache and without an attention mask, with which transformers does not look for documents. The
    first token of a document is not predicted from the one before.

    Args:
        documents: the token ids of each.
        length: tokens of a row.

    Raises:
        ValueError: too few tokens for a row, or a length below 2.
    """

    def __init__(self, documents: Iterable[Int[Tensor, "_"]], length: int) -> None:
        if length < 2:
            raise ValueError(f"a row of {length} tokens predicts none; choose a length of 2 or more")
        whole = [ids for ids in documents if len(ids)]
        tokens = sum(map(len, whole))
        if tokens < length:
            raise ValueError(f"the documents have {tokens} tokens, too few for a row of {length}; give more documents")
        rows = tokens // length
        numbers = torch.arange(len(whole)).repeat_interleave(torch.tensor(list(map(len, whole))))
        self.length = length
        self.input_ids = torch.cat(whole)[: rows * length].view(rows, length)
        self._document = numbers[: rows * length].view(rows, length)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `position_ids` and `labels` (length,), int64; the model is to shift the labels."""
        ids, document = self.input_ids[index].long(), self._document[index]
        place = torch.arange(self.length)
        starts = document.diff(prepend=document[:1] - 1) != 0
        positions = place - torch.where(starts, place, 0).cummax(0).values
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(starts, -100)}


def packed(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Packed:
    """Encode texts, each ending in the tokenizer's end of text if it has one, and pack them into rows.

    Raises:
        TypeError: a text alone, whose letters would be documents.
        ValueError: too few tokens for a row.
    """
    if isinstance(texts, str):
        raise TypeError("expected texts, and got one alone; put it into a list")
    return Packed(map(with_end(tokenizer), texts), length)


class PackedDomains(ConcatDataset[dict[str, Tensor]]):
    """The packed rows of several domains, one domain after another.

    Args:
        rows: those of each domain, of one length.
    """

    def __init__(self, rows: Mapping[str, Packed]) -> None:
        super().__init__(rows.values())
        self.domains = tuple(rows)
        self.length = next(iter(rows.values())).length

    def domain_of(self, index: int) -> str:
        """Return the name of the domain that a row was cut from."""
        return self.domains[bisect_right(self.cumulative_sizes, index)]


def packed_parts(texts: Corpus | Texts, tokenizer: Tokenizer, length: int) -> tuple[PackedDomains, PackedDomains]:
    """Return packed rows to train on and held-out ones; a domain too small for a row is left out.

    Raises:
        ValueError: a part has no row.
    """

    def part(domains: Encoded) -> PackedDomains:
        large = {domain: given for domain, given in domains.items() if sum(map(len, given)) >= length}
        return PackedDomains({domain: Packed(given, length) for domain, given in large.items()})

    train, validation = encoded(texts, tokenizer, length)
    return part(train), part(validation)
