"""Documents by domain for adapters that are trained apart: what is asked, what is answered, and blocks of both."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify.data.claim_files import data_file

GENERAL = ("encyclopedia", "diary", "economics", "biology", "code_rust", "code_go", "docs_pt", "lang_fr")
CAP, LENGTH, BATCH = 300_000, 128, 4


@dataclass(frozen=True)
class Collection:
    """Documents by domain: those of the adapters, and those that no adapter sees."""

    folder: str
    test: str
    column: str
    own: tuple[str, ...]
    unseen: tuple[str, ...]
    blocks: int

    def read(self, part: str, domains: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
        """Of every domain, what is asked and what is answered, in one random order, up to CAP bytes."""
        found: dict[str, list[tuple[str, str]]] = {domain: [] for domain in domains}
        with gzip.open(data_file(f"{self.folder}/{part}.jsonl.gz"), "rt") as lines:
            rows = [row for row in map(json.loads, lines) if row[self.column] in found]
        random.Random(0).shuffle(rows)
        sizes = dict.fromkeys(domains, 0)
        for row in rows:
            domain = row[self.column]
            pair = ("", row["text"]) if "text" in row else (row["input"] + "\n", row["target"])
            if sizes[domain] < CAP:
                found[domain].append(pair)
                sizes[domain] += len("".join(pair).encode())
        return found


COLLECTIONS = {
    "text-domains": Collection(
        "text-domains", "validation", "domain",
        ("novel", "philosophy", "math", "code_python", "shell", "docs_fr"), ("drama", "code_java"), 24,
    ),
    "instruct-mix": Collection(
        "instruct-mix", "test", "dataset",
        ("banking77", "gsm8k", "common_gen", "techdocs_mt", "commonsense_qa", "paws"), ("quartz", "dbpedia_14"), 48,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """Token ids and labels, both (blocks, LENGTH); a label of -100 does not count."""

    ids: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> Blocks:
        return Blocks(self.ids[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Base:
    """A dense model and how it reads text."""

    model: nn.Module
    encode: Callable[[str], list[int]]
    end: int

    def blocks(self, documents: list[tuple[str, str]]) -> Blocks:
        ids, labels = [], []
        for asked, answered in documents:
            question, answer = self.encode(asked) if asked else [], [*self.encode(answered), self.end]
            ids += question + answer
            labels += [-100] * len(question) + answer
        whole = len(ids) // LENGTH * LENGTH
        return Blocks(torch.tensor(ids[:whole]).view(-1, LENGTH), torch.tensor(labels[:whole]).view(-1, LENGTH))


def drawn(domains: list[Blocks], steps: int, seed: int, batch: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Batches of blocks, each of a domain that is drawn anew."""
    dice = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = [domains[d] for d in torch.randint(len(domains), (batch,), generator=dice)]
        at = [int(torch.randint(len(blocks), (), generator=dice)) for blocks in chosen]
        yield {
            "input_ids": torch.stack([blocks.ids[i] for blocks, i in zip(chosen, at, strict=True)]),
            "labels": torch.stack([blocks.labels[i] for blocks, i in zip(chosen, at, strict=True)]),
        }
