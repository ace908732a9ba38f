"""Embeddings of texts by their words alone, where there is no trained model to ask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class HashedWords:
    """How often words occur, each counted at a place that its hash gives, in vectors of length 1.

    Attributes:
        width: D.
    """

    width: int = 256

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "T D"]:
        """The embedding of every text; numbers count as one word."""
        found = torch.zeros(len(texts), self.width)
        for row, text in zip(found, texts, strict=True):
            for word in re.findall(r"\w+", re.sub(r"\d+", "0", text.lower())):
                row[crc32(word.encode(errors="replace")) % self.width] += 1
        return F.normalize(found, dim=-1)
