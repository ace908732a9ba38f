"""Engram, a conditional memory: looks n-grams of token ids up in hashed tables, gated by what the layer reads."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context


class Engram(nn.Module):
    """A lookup of the last tokens beside a sparse layer (Engram, arXiv 2601.07372).

    For n = 2 .. `ngrams` and each of h heads, with odd random multipliers m and a prime p for each table:

        z = (t_0 · m_0) xor (t_1 · m_1) xor ...    the token id t_0, and the n - 1 ids before it
        e = concat of table[z mod p]               one row of each table
        α = sigmoid(sign(s) · sqrt|s|),  s = norm(W_k e) · norm(x) / sqrt(D)
        v = α · W_v e
        y = v + silu(conv(norm(v)))                depthwise and causal, one tap in `ngrams` tokens

    A lookup costs no FLOPs, whatever the size of the tables. Ids and values of other documents, of padding and from
    before the sequence are not read: `pad` and zeros take their places. W_v starts at zero, and so does the memory.

    Args:
        width: D.
        rows: rows of each table at least; table j has the j-th prime number of rows from there on.
        dimensions: of all rows of one n together.
        ngrams: the largest n.
        heads: h, tables per n; divides `dimensions`.
        kernel: taps of the convolution.
        pad: the id in place of tokens that are not there.
        vocabulary: number of token ids, which bounds the multipliers.
        key: the name of the model's input that holds the ids.
        eps: of the norms.

    Raises:
        ValueError: heads that do not divide the dimensions, or no n-gram of two tokens; in `forward`, a model that was
            called without ids, or with ids of other tokens than the layer's; ids of a continued sequence, whose earlier
            tokens are not there.
    """

    def __init__(
        self, width: int, *, rows: int = 4096, dimensions: int = 64, ngrams: int = 3, heads: int = 4, kernel: int = 4,
        pad: int = 0, vocabulary: int = 1 << 18, key: str = "input_ids", eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        if heads < 1 or dimensions % heads or ngrams < 2:
            raise ValueError(
                f"{heads} heads cannot share {dimensions} dimensions of n-grams up to {ngrams}; choose heads that "
                "divide the dimensions, and ngrams >= 2"
            )
        self.ngrams, self.heads, self.pad, self.key = ngrams, heads, pad, key
        primes = _primes(rows, self.tables)
        sizes = torch.tensor(primes)
        self.register_buffer("multipliers", 2 * torch.randint(2**62 // vocabulary, (ngrams,)) + 1)
        self.register_buffer("sizes", sizes)
        self.register_buffer("starts", sizes.cumsum(0) - sizes)
        self.table = nn.Parameter(torch.randn(sum(primes), dimensions // heads) * 0.02)
        self.keys, self.values = (nn.Linear(dimensions * (ngrams - 1), width, bias=False) for _ in range(2))
        self.norm_key, self.norm_query, self.norm_value = (nn.RMSNorm(width, eps=eps) for _ in range(3))
        self.conv = nn.Parameter(torch.empty(kernel, width).uniform_(-1, 1) / math.sqrt(kernel))
        nn.init.zeros_(self.values.weight)

    @property
    def tables(self) -> int:
        """The number of tables, from each of which a token reads a row."""
        return self.heads * (self.ngrams - 1)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Float[Tensor, "... D"]:
        """Look up every token of a layer's input."""
        ids, turned = self._ids(x, context), x.dim() == 3 and not context.call.batch_first
        segment = _segments(x, context)
        if turned:
            x, segment = x.transpose(0, 1), segment.transpose(0, 1)
        tokens, segment = x.reshape(*ids.shape, x.shape[-1]), segment.reshape(ids.shape)
        y = self.recall(tokens, ids, segment).reshape(x.shape)
        return y.transpose(0, 1) if turned else y

    def recall(
        self, x: Float[Tensor, "B N D"], ids: Int[Tensor, "B N"], segment: Int[Tensor, "B N"]
    ) -> Float[Tensor, "B N D"]:
        """The memory's output for tokens with these ids; those of one segment see each other."""
        e = F.embedding(self.places(ids, segment), self.table).flatten(-2)
        s = (self.norm_key(self.keys(e)) * self.norm_query(x)).sum(-1, keepdim=True) / math.sqrt(x.shape[-1])
        v = torch.sigmoid(s.sign() * s.abs().clamp_min(1e-6).sqrt()) * self.values(e)
        normed, taps = self.norm_value(v), len(self.conv)
        mixed = [self.conv[-1 - j] * shifted(normed, j * self.ngrams, segment, 0.0) for j in range(taps)]
        return v + F.silu(torch.stack(mixed).sum(0))

    def places(self, ids: Int[Tensor, "B N"], segment: Int[Tensor, "B N"]) -> Int[Tensor, "B N tables"]:
        """The rows of all tables together that tokens read, the tables of 2-grams first."""
        mixed, by_ngram = ids.long() * self.multipliers[0], []
        for n in range(1, self.ngrams):
            mixed = mixed ^ (shifted(ids.long(), n, segment, self.pad) * self.multipliers[n])
            by_ngram.append(mixed.unsqueeze(-1).expand(*ids.shape, self.heads))
        return torch.cat(by_ngram, -1) % self.sizes + self.starts

    def _ids(self, x: Float[Tensor, "... D"], context: Context) -> Int[Tensor, "B N"]:
        ids = context.look_up(self.key)
        if ids is None:
            raise ValueError(
                f"an Engram looks up n-grams of token ids, and the model was called without {self.key!r} (images have "
                "none, nor have calls with embeddings); call it with ids, or use memory=nothing"
            )
        if ids.dim() != 2 or ids.numel() != math.prod(x.shape[:-1]):
            raise ValueError(
                f"{self.key!r} has shape {tuple(ids.shape)}, and the layer was given tokens of shape "
                f"{tuple(x.shape[:-1])}; name the input with the ids of these tokens by key=, or choose "
                "another recipe: a decoder or second tower has other tokens"
            )
        if _continues(ids, context):
            raise ValueError(
                "an Engram reads the ids of earlier tokens, and this call continues a sequence whose ids it was not "
                "given; generate with use_cache=False"
            )
        return ids

    def extra_repr(self) -> str:
        """Tables and rows."""
        return f"tables={self.tables}, rows={len(self.table)}, ngrams={self.ngrams}"


def shifted(values: Tensor, by: int, segment: Int[Tensor, "B N"], fill: float) -> Tensor:
    """The values (B, N, ...) of `by` tokens earlier; `fill` where that is another segment, or before the sequence."""
    if by == 0:
        return values
    place = torch.arange(values.shape[1], device=values.device) - by
    there = (place >= 0) & (segment[:, place.clamp_min(0)] == segment)
    earlier = values[:, place.clamp_min(0)]
    return torch.where(there.view(*there.shape, *[1] * (values.dim() - 2)), earlier, fill)


def _continues(ids: Int[Tensor, "B N"], context: Context) -> bool:
    """Whether earlier tokens of the sequences are in a cache: the mask is longer, or no position is 0."""
    mask, positions = context.look_up("attention_mask"), context.look_up("position_ids")
    if mask is not None and mask.dim() == 2 and mask.shape[1] > ids.shape[1]:
        return True
    return positions is not None and bool((positions.amin(-1) > 0).any())


def _segments(x: Float[Tensor, "... D"], context: Context) -> Int[Tensor, "..."]:
    """The document of each token, -1 for padding."""
    shape = x.shape[:-1]
    documents, real = context.documents(shape), context.real(shape)
    segment = torch.zeros(math.prod(shape), dtype=torch.int64, device=x.device) if documents is None else documents
    if real is not None:
        segment = torch.full_like(segment, -1).scatter(0, real, segment[real])
    return segment.view(shape)


def _primes(start: int, count: int) -> list[int]:
    """The first prime numbers from `start` on."""
    found, number = [], max(start, 2)
    while len(found) < count:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            found.append(number)
        number += 1
    return found
