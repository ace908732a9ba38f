"""Metrics of expert similarity, representation collapse, and router saturation.

Functions of one layer's decision, experts or activations; `moeify.record` gives the decisions of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from moeify import losses
from moeify.experts import Each, Experts
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.routing import Assignment, Routing


def margin(routing: Routing) -> float:
    """Mean difference between the highest and second-highest score of a token: 0 means a tie.

    Raises:
        ValueError: the decision keeps no scores, or there is one expert only.
    """
    if routing.scores is None or routing.scores.shape[-1] < 2:
        raise ValueError("a margin needs a router that keeps its scores of two experts or more")
    first, second = routing.scores.topk(2, dim=-1).values.unbind(-1)
    return (first - second).mean().item()


def overlap(one: Assignment, other: Assignment) -> float:
    """Mean over tokens of the share of `other`'s experts that `one` uses too: 1 is the same choice.

    With the decisions of an earlier and of the last checkpoint on the same tokens it is router saturation (OLMoE,
    arXiv 2409.02060). Rows that a capacity dropped do not count.

    Raises:
        ValueError: decisions on different numbers of tokens or experts.
    """
    mine, theirs = _used(one, other), _used(other, one)
    routed = theirs.any(-1)
    return ((mine & theirs).sum(-1)[routed] / theirs.sum(-1)[routed]).mean().item()


def switched(one: Assignment, other: Assignment) -> float:
    """Share of tokens, of those that both decisions route, whose first expert differs.

    Raises:
        ValueError: decisions without the rank of their rows, or on different numbers of tokens.
    """
    mine, theirs = _first(one), _first(other)
    if len(mine) != len(theirs):
        raise ValueError(f"decisions on {len(mine)} and on {len(theirs)} tokens cannot be compared; record the same")
    both = (mine >= 0) & (theirs >= 0)
    return (mine != theirs)[both].float().mean().item()


def output_similarity(experts: Experts, x: Float[Tensor, "T D"]) -> dict[str, float]:
    """Similarity of the experts' outputs for the same tokens: mean `cosine` and mean `cka` over pairs of experts.

    `moeify.losses.cosine` and `moeify.losses.linear_cka` have the pairs. A few hundred tokens are enough.
    """
    with torch.no_grad():
        outputs = experts.all_outputs(x)
        pairs = {"cosine": losses.cosine(outputs), "cka": losses.linear_cka(outputs)}
        return {name: losses.similarity(matrix).item() for name, matrix in pairs.items()}


def weight_cosine(experts: nn.Module) -> Float[Tensor, "E E"]:
    """Cosine of all weights of two experts; 1 right after upcycling by copies.

    Args:
        experts: of stacked weights (E, ...), moeify's or those of transformers, or an `Each` of equal modules.

    Raises:
        ValueError: experts of different sizes, or weights that are not stacked.
    """
    if isinstance(experts, Each):
        vectors = [parameters_to_vector(expert.parameters()) for expert in experts.experts]
        if len({len(vector) for vector in vectors}) > 1:
            raise ValueError("experts of different sizes have no cosine between their weights")
        stacked = torch.stack(vectors)
    else:
        common = experts.common_modules() if isinstance(experts, Experts) else ()
        shared = {id(parameter) for module in common for parameter in module.parameters()}
        parameters = [parameter for parameter in experts.parameters() if id(parameter) not in shared]
        if len({len(p) for p in parameters}) != 1 or min(p.dim() for p in parameters) < 2:
            raise ValueError(f"{type(experts).__name__} does not stack the weights of its experts as (E, ...)")
        stacked = torch.cat([p.flatten(1) for p in parameters], dim=1)
    unit = F.normalize(stacked.detach().float(), dim=-1)
    return unit @ unit.T


def effective_rank(x: Float[Tensor, "T D"]) -> float:
    """exp of the entropy of the normalised singular values: how many directions are in use (Roy & Vetterli 2007)."""
    values = torch.linalg.svdvals(x.detach().float())
    p = values / values.sum()
    return torch.special.xlogy(p, p).sum().neg().exp().item()


def participation_ratio(x: Float[Tensor, "T D"]) -> float:
    """(Σ λ)² / Σ λ² over the eigenvalues λ of the covariance: how many directions carry the variance."""
    centred = x.detach().float() - x.detach().float().mean(0)
    values = torch.linalg.svdvals(centred).square()
    return (values.sum().square() / values.square().sum()).item()


def representation_collapse(x: Float[Tensor, "T D"], routing: Assignment) -> float:
    """Tr(Σ_W Σ_B^+): spread within the tokens of an expert against the spread between experts; small is collapsed.

    Tokens belong to their first expert; Σ are mean outer products of deviations, from the expert's mean and of the
    experts' means from their common mean (neural collapse; after X-MoE, arXiv 2204.09179).

    Args:
        x: the layer's inputs, of all tokens.
        routing: the decision on them.
    """
    first = _first(routing)
    tokens, expert = x.detach().float()[first >= 0], first[first >= 0]
    used = expert.unique()
    means = torch.stack([tokens[expert == e].mean(0) for e in used])
    within = tokens - means[torch.searchsorted(used, expert)]
    between = means - means.mean(0)
    covariances = within.T @ within / len(within), between.T @ between / len(between)
    return (covariances[0] @ torch.linalg.pinv(covariances[1], hermitian=True)).trace().item()


@contextmanager
def without_first(layers: Mapping[str, MoE]) -> Iterator[None]:
    """Context manager that removes every token's first expert and rescales its other weights to the same sum.

    (DeepSeekMoE, arXiv 2401.06066, masks the expert before the choice, so that the next one replaces it; here
    the token has one expert less, for any router.) With k = 1 a token keeps none.
    """
    handles = [moe.router.register_forward_hook(_without_first) for moe in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def redundancy(model: nn.Module, loss: Callable[[], float]) -> dict[str, float]:
    """Rise of the loss when the tokens of one layer lose their first expert, by layer; a small rise means redundancy.

    Args:
        model: a sparse model; put it in evaluation first.
        loss: computes the model's loss on fixed data.

    Raises:
        ValueError: the model has no `MoE` layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer of moeify whose first experts could be masked")
    with torch.no_grad():
        whole = float(loss())
        rises = {}
        for name, moe in layers.items():
            with without_first({name: moe}):
                rises[name] = float(loss()) - whole
    return rises


def _without_first(module: nn.Module, args: tuple, routing: Routing) -> Assignment:
    if not isinstance(routing, Assignment) or routing.rank is None:
        raise ValueError(
            f"{type(module).__name__} does not record which expert is a token's first, so none can be masked"
        )
    return routing.only(routing.rank > 0).with_weight_sums_of(routing)


def _used(routing: Assignment, other: Assignment) -> Bool[Tensor, "T E"]:
    sizes = [(math.prod(r.shape), len(r.counts)) for r in (routing, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"decisions on {sizes[0][0]} tokens of {sizes[0][1]} experts and on {sizes[1][0]} of {sizes[1][1]} cannot "
            "be compared; record the same tokens"
        )
    used = torch.zeros(sizes[0], dtype=torch.bool, device=routing.counts.device)
    return used.index_put((routing.source, routing.expert), torch.ones((), dtype=torch.bool, device=used.device))


def _first(routing: Assignment) -> Int[Tensor, "T"]:
    """The first expert of every token, -1 where there is none."""
    if routing.rank is None:
        raise ValueError("this decision does not record which expert is a token's first")
    first = routing.rank == 0
    expert = torch.full((math.prod(routing.shape),), -1, device=routing.counts.device)
    return expert.index_put((routing.source[first],), routing.expert[first])
