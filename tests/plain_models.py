"""Plain PyTorch models whose feed-forward networks lie in every shape that `sparsify` knows, and how to look inside."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeify import MoE
from moeify.context import extra_inputs
from moeify.routers.lookup import columns


class Block(nn.Module):
    """`x + ffn(x)`: a layer of a transformer without the attention."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class Gated(nn.Module):
    """A gated FFN whose parts are named and ordered as no other model does."""

    def __init__(self, width: int = 8, hidden: int = 12, bias: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Linear(hidden, width, bias=bias)
        self.alpha = nn.Linear(width, hidden, bias=bias)
        self.beta = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma(F.silu(self.beta(x)) * self.alpha(x))


class Residual(nn.Module):
    """An FFN that adds a residual which it is given (Bloom, MPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) + residual


class Strange(nn.Module):
    """The linear maps of an FFN, computing something else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sort(-1).values)


class Recommender(nn.Module):
    """Embeddings of a user and an item, and a tower of linear maps that scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 8), nn.Embedding(30, 8)
        self.tower = tower()

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.tower(torch.cat([self.user(user), self.item(item)], dim=-1)).squeeze(-1)


class Tied(nn.Module):
    """A language model of a few lines, whose output map is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.Sequential(*blocks(2))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids)))


def blocks(number: int) -> list[Block]:
    """Layers with gated FFNs."""
    return [Block(Gated()) for _ in range(number)]


def tower() -> nn.Sequential:
    """16 -> 32 -> 16 -> 1 with normalisation and dropout."""
    return nn.Sequential(
        nn.Linear(16, 32),
        nn.LayerNorm(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 1),
    )


def vit_mlp() -> nn.Sequential:
    """The MLP of a ViT as it is often written by hand."""
    return nn.Sequential(
        nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8), nn.Dropout(0.1)
    )


def encoder(**options) -> nn.TransformerEncoder:
    """torch's own encoder."""
    options = {"batch_first": True, "dropout": 0.0} | options
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, **options), 2)


def output(model: nn.Module, given: dict | tuple) -> Tensor:
    """The tensor that a model answers with."""
    result = model(**given) if isinstance(given, dict) else model(*given)
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result.logits_per_image


def told(model: nn.Module, sequences: int) -> AbstractContextManager[None]:
    """Inside, routers that look up what no forward takes, a cluster, find 0 for every sequence."""
    return extra_inputs(model, **dict.fromkeys(columns(model), torch.zeros(sequences, dtype=torch.int64)))


def sparse_layers(model: nn.Module) -> dict[str, MoE]:
    """The sparse layers of a model by name."""
    return {name: part for name, part in model.named_modules() if isinstance(part, MoE)}
