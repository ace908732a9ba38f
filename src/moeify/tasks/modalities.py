"""LIMoE's entropies as losses of one tower, and which modality uses which experts (arXiv 2206.02770)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.evaluate.objective import Batch
from moeify.layers import sparse_layers
from moeify.losses import global_entropy, local_entropy
from moeify.models.one_tower import CAPTION, PICTURE
from moeify.modes import in_evaluation
from moeify.record import record
from moeify.routing import Assignment, Routing
from moeify.train.arguments import Loss

MODALITIES = {"pictures": PICTURE, "captions": CAPTION}

SHARES = {"pictures": 20 / 32, "captions": 9 / 32}
"""The share of the experts that each modality is to use at least: 20 and 9 of 32 in LIMoE."""


@dataclass(frozen=True)
class LocalEntropy:
    """`local_entropy` of one modality: every token of it is to be sure of its expert.

    Attributes:
        modality: a name of `MODALITIES`.
    """

    modality: str

    @property
    def __name__(self) -> str:
        return f"local entropy of {self.modality}"

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The mean entropy of its decisions."""
        return local_entropy(routing, label=MODALITIES[self.modality])


@dataclass(frozen=True)
class GlobalEntropy:
    """`global_entropy` of one modality: it is to use a number of experts.

    Attributes:
        modality: a name of `MODALITIES`.
        experts: S, how many at least.
    """

    modality: str
    experts: float

    @property
    def __name__(self) -> str:
        return f"global entropy of {self.modality} for {self.experts:g} experts"

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """What the entropy of its mean decision lacks of log S."""
        return global_entropy(routing, experts=self.experts, label=MODALITIES[self.modality])


def entropies(weight: float, num_experts: int) -> list[tuple[float, Loss]]:
    """LIMoE's losses: both entropies of captions, and the global one of pictures."""
    wanted = {modality: max(1.0, share * num_experts) for modality, share in SHARES.items()}
    return [(weight, LocalEntropy("captions")), *((weight, GlobalEntropy(*each)) for each in wanted.items())]


@torch.no_grad()
def use_of_experts(model: nn.Module, batch: Batch) -> list[str]:
    """How many experts each modality uses, and the share of its tokens that no expert takes, a line per sparse layer.

    The number is exp H of the modality's share of tokens per expert, before any capacity limit. Layers whose decisions
    have no labels are left out.
    """
    if not sparse_layers(model):
        return []
    with in_evaluation(model), record(model) as decisions:
        model(**batch)
    lines = []
    for name, routing in decisions.items():
        labels = routing.evidence.label
        if not isinstance(routing, Assignment) or routing.choices is None or labels is None:
            continue
        placed = _placed(routing, len(labels), batch["attention_mask"])
        found = []
        for modality, label in MODALITIES.items():
            of = labels == label
            load = routing.choices.indices[of].flatten().bincount(minlength=len(routing.counts)).double()
            used = torch.distributions.Categorical(load).entropy().exp()
            dropped = 1 - placed[of].double().mean()
            found.append(f"{modality} use {used:.1f} of {len(load)} experts, {dropped:.0%} of their tokens get none")
        lines.append(f"{name}: {'; '.join(found)}")
    return lines


def _placed(routing: Assignment, tokens: int, caption_mask: Tensor) -> Bool[Tensor, "T"]:
    """Which of the real tokens an expert took."""
    pairs, longest = len(caption_mask), routing.shape[1]
    patches = (tokens - int(caption_mask.sum())) // pairs
    pictures = F.pad(caption_mask.new_ones(pairs, patches), (0, longest - patches))
    real = torch.cat([pictures, F.pad(caption_mask, (0, longest - caption_mask.shape[1]))]).bool().flatten()
    taken = real.new_zeros(len(real)).index_fill(0, routing.source, True)
    return taken[real]
