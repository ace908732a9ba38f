"""The bytes of text-domains, in blocks that know their domain."""

from __future__ import annotations

import gzip
import json

from moeify.data import ByteTokenizer, Texts, blocks
from moeify.data.blocks import Blocks
from moeify.data.claim_files import data_file


def text_by_domain(domains: tuple[str, ...], cap: int, length: int) -> tuple[Blocks, Blocks]:
    """Training and validation blocks of `length` bytes, from the first documents of each domain up to `cap` bytes."""
    parts = []
    for part in ("train", "validation"):
        documents: dict[str, list[str]] = {domain: [] for domain in domains}
        sizes = dict.fromkeys(domains, 0)
        with gzip.open(data_file(f"text-domains/{part}.jsonl.gz"), "rt") as lines:
            for row in map(json.loads, lines):
                domain = row["domain"]
                if domain in sizes and sizes[domain] < cap:
                    documents[domain].append(row["text"])
                    sizes[domain] += len(row["text"].encode())
        parts.append(documents)
    return blocks(Texts(*parts), ByteTokenizer(), length)
