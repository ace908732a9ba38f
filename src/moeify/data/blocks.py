"""Cut the tokens of texts into blocks of one length, the samples that a language model is trained on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from moeify.data.corpus import Corpus
from moeify.data.encoded import Encoded, encoded
from moeify.data.text import Texts
from moeify.data.tokenizer import Tokenizer


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of `length` tokens that do not overlap, cut from one stream of tokens per domain.

    A domain has as many blocks as its size gives, so a shuffling sampler mixes the domains in proportion to their
    sizes. What is left at the end of a stream is not used. `domains` are the names, in the order of the blocks.
    """

    def __init__(self, tokens: Mapping[str, Int[Tensor, "_"]], length: int) -> None:
        cut = [stream[: len(stream) // length * length].view(-1, length) for stream in tokens.values()]
        self.length = length
        self.domains = tuple(tokens)
        self.input_ids = torch.cat(cut)  # (blocks, length)
        self.domain = torch.repeat_interleave(torch.tensor([len(blocks) for blocks in cut]))  # (blocks,)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels` (length,), int64; the model is to shift the labels."""
        ids = self.input_ids[index].long()
        return {"input_ids": ids, "labels": ids.clone()}

    def domain_of(self, index: int) -> str:
        """Return the name of the domain that a block was cut from."""
        return self.domains[int(self.domain[index])]


def blocks(texts: Corpus | Texts, tokenizer: Tokenizer, length: int) -> tuple[Blocks, Blocks]:
    """Return the train and the validation blocks; each document ends with the tokenizer's end of text, if it has one.

    Raises ValueError if a part has no block.
    """

    def part(domains: Encoded) -> Blocks:
        return Blocks({domain: torch.cat(documents) for domain, documents in domains.items()}, length)

    train, validation = encoded(texts, tokenizer, length)
    return part(train), part(validation)
