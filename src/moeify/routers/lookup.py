"""Experts that are looked up: by token id (hash layers), task, cluster, language or modality."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.context import Context, extra_inputs
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "lookup")
class Lookup(Router):
    """The experts that a fixed table lists for a key of each token or of its sequence.

    Hash layers (arXiv 2106.04426) look up the token id with weight 1; DeepSeek-V4's hash layers learn the weights of
    the looked-up experts; task, cluster and modality routing look up a column of their data.

    Args:
        width: D.
        num_experts: E.
        key: the name of the model's input to look up, of shape (B, N) or (B,).
        size: entries of the table; a key beyond it is taken modulo `size`, as hash tables do.
        k: experts per key.
        learned: learn the weights: sqrt(softplus) of a projection, normalised; otherwise they are 1 / k.
        scale: multiplies the weights; DeepSeek-V4 takes 1.5.

    Raises:
        ValueError: k outside 1..E; an empty table; k = 1 with learned weights, which normalised are the constant 1; in
            `forward`, an input that the model was not given, or that fits neither tokens nor sequences.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        key: str = "input_ids",
        size: int = 65536,
        k: int = 1,
        learned: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=learned)
        if size < 1:
            raise ValueError(f"a table of size={size} has no entry to look up; choose size >= 1")
        self.num_experts, self.key, self.k, self.scale = num_experts, key, k, scale
        self.weights_sum_to_one = scale == 1.0
        self.register_buffer("table", balanced_table(size, num_experts, k))
        self.weight = nn.Parameter(torch.randn(num_experts, width) * 0.02) if learned else None

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the experts of its key."""
        tokens = real_tokens(x, context)
        indices = self.table[tokens.keys(context, self.key) % len(self.table)]  # (T, k)
        if self.weight is None:
            topk_weights = torch.full(indices.shape, self.scale / self.k, device=x.device)
            return tokens.assign(indices, topk_weights, self.num_experts)
        logits = project(tokens.x, self.weight)
        scores = nn.functional.softplus(logits).sqrt()
        topk_weights = scores.gather(-1, indices)
        topk_weights = self.scale * topk_weights / topk_weights.sum(-1, keepdim=True)
        return tokens.assign(indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=scores))

    @property
    def keeps_scores(self) -> bool:
        """Whether the weights are learned."""
        return self.weight is not None


def balanced_table(size: int, num_experts: int, k: int) -> Int[Tensor, "size k"]:
    """k different experts for every key, drawn at random, so that among any first n keys all are equally frequent."""
    blocks = math.ceil(size / num_experts)
    first = torch.rand(blocks, num_experts).argsort(-1).unsqueeze(-1)  # of E keys each takes another expert
    step = 1 + torch.rand(blocks, 1, num_experts - 1).argsort(-1)[..., : k - 1]
    table = torch.cat([first, (first + step) % num_experts], dim=-1)  # (blocks, E, k)
    return table.flatten(0, 1)[:size]


def columns(model: nn.Module) -> set[str]:
    """The inputs that routers of a model look up, named by their attribute `key`, and that no forward in it takes."""
    wanted = {str(part.key) for part in model.modules() if isinstance(part, Router) and hasattr(part, "key")}
    classes = {type(module) for module in model.modules()} if wanted else set()
    return wanted - {name for module_class in classes for name in inspect.signature(module_class.forward).parameters}


@contextmanager
def split_router_inputs(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Pass the columns that only routers read to the routers while it lasts; yields the other columns."""
    looked_up = {name: batch[name] for name in columns(model) & batch.keys()}
    others = {name: value for name, value in batch.items() if name not in looked_up}
    if not looked_up:
        yield others
        return
    with extra_inputs(model, **looked_up):
        yield others
