"""Convert the choices of an MoE block of transformers into a routing decision, with scores and without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moeify.context import Context
from moeify.routers.topk import sigmoid, softmax, sqrt_softplus
from moeify.routing import Assignment, Evidence, assign

_unobserved: ContextVar[bool] = ContextVar("unobserved", default=False)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The choices of a block for its tokens, padding included.

    Attributes:
        index: the experts of every token.
        weights: their weights.
        router_output: logits or probabilities of all experts, if the router returned them.
        kept: which of the choices are within capacity; all, if the block has no capacity.
        score: the score function; if not given it is inferred from the weights.
    """

    index: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    router_output: Float[Tensor, "... E"] | None = None
    kept: Bool[Tensor, "N K"] | None = None
    score: Callable[[Tensor], Tensor] | None = None


@contextmanager
def unobserved() -> Iterator[None]:
    """Context manager in which calls of transformers' experts are not recorded, since no router decided them."""
    before = _unobserved.set(True)
    try:
        yield
    finally:
        _unobserved.reset(before)


def is_observed() -> bool:
    """Whether calls of experts are recorded, as everywhere outside `unobserved`."""
    return not _unobserved.get()


def choices(arguments: Iterable[Any]) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Index and weights among the arguments of transformers' experts: families call them by different names."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    index = next(t for t in tensors if not t.is_floating_point())
    weights = next(t for t in reversed(tensors) if t.is_floating_point() and t.shape == index.shape)
    return index, weights


def routing_of(chosen: Chosen, num_experts: int, context: Context) -> Assignment:
    """The decision of a block, without padding, as losses, controllers and statistics read it.

    Args:
        chosen: the choices of the block.
        num_experts: E.
        context: which tokens are real.
    """
    index, weights, kept, output = chosen.index, chosen.weights, chosen.kept, chosen.router_output
    tokens = index.shape[0]
    positions = context.real(tokens)
    sequence_id = context.sequence_ids([tokens]).to(index.device)
    if output is not None:
        output = output.reshape(tokens, -1).float() if output.shape[-1] == num_experts else None
    if positions is not None:
        index, weights, sequence_id = index[positions], weights[positions], sequence_id[positions]
        kept = None if kept is None else kept[positions]
        output = None if output is None else output[positions]
    if output is None:
        logits = scores = None
    elif chosen.score is not None:
        logits, scores = output, chosen.score(output)
    else:
        logits, scores = logits_and_scores(output, index, weights)
    routing = assign(
        index, weights, num_experts,
        shape=(tokens,), positions=positions, evidence=Evidence(logits=logits, scores=scores, sequence_id=sequence_id),
    )  # fmt: skip
    return routing if kept is None else routing.only(kept.flatten()[index.flatten().argsort(stable=True)])


def logits_and_scores(
    output: Float[Tensor, "T E"], index: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]:
    """The logits that a router's output holds, and the scores that its weights come from.

    The score function is the one that explains the weights best, for they are proportional to the chosen scores. An
    output that is a probability already (Gemma 4) has its logarithm as logits.
    """
    with torch.no_grad():
        errors = [_misfit(score(output).gather(-1, index), weights.float()) for score in _SCORES]
        probable = (output >= 0).all() & ((output.sum(-1) - 1).abs() < 1e-3).all()
        best = int(torch.stack([torch.where(probable, -1.0, torch.inf), *errors]).argmin())
    if best == 0:
        return output.clamp_min(torch.finfo(output.dtype).tiny).log(), output
    return output, _SCORES[best - 1](output)


_SCORES = (softmax, sigmoid, sqrt_softplus)


def _misfit(chosen: Float[Tensor, "T K"], weights: Float[Tensor, "T K"]) -> Float[Tensor, ""]:
    return (chosen / chosen.sum(-1, keepdim=True) - weights / weights.sum(-1, keepdim=True)).abs().sum()
