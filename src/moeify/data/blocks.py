"""Cut the tokens of texts into blocks of one length, the samples that a language model is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from moeify.data.corpus import Corpus
from moeify.data.text import Texts
from moeify.data.tokenizer import Tokenizer
from moeify.progress import Progress


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

    def part(name: str, domains: Mapping[str, bytes | Sequence[str]]) -> Blocks:
        whole = {domain: _documents(documents) for domain, documents in domains.items()}
        characters = sum(len(text) for documents in whole.values() for text in documents)
        progress, done = Progress(f"tokens of the {name} part", characters), 0
        tokens = {}
        for domain, documents in whole.items():
            tokens[domain] = _stream(documents, tokenizer, progress, done)
            done += sum(map(len, documents))
        longest = max(map(len, tokens.values()), default=0)
        if longest < length:
            raise ValueError(
                f"the {name} part has {longest} tokens in its largest domain, too few for a block of {length}; "
                "give more text" + (f", or a length of at most {longest}" if longest else "")
            )
        return Blocks(tokens, length)

    return part("train", texts.train), part("validation", texts.validation)


def _documents(documents: bytes | Sequence[str]) -> Sequence[str]:
    return [documents.decode()] if isinstance(documents, bytes) else documents


def _stream(documents: Sequence[str], tokenizer: Tokenizer, progress: Progress, done: int) -> Int[Tensor, "_"]:
    eos = getattr(tokenizer, "eos_token_id", None)
    end = [] if eos is None else [eos]
    streams = [torch.tensor([], dtype=torch.int32)]
    for text in documents:
        progress.at(done)
        streams.append(torch.tensor(tokenizer.encode(text) + end, dtype=torch.int32))
        done += len(text)
    return torch.cat(streams)
