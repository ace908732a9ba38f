"""Similarity of experts, of router rows, and the coupling of both: losses of outputs and weights, not of a decision."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.experts import FFN


def cosine(outputs: Float[Tensor, "T E O"]) -> Float[Tensor, "E E"]:
    """Mean over tokens of the cosine between two experts' outputs for the same token."""
    unit = F.normalize(outputs.float(), dim=-1)
    return torch.einsum("tio,tjo->ij", unit, unit) / len(outputs)


def linear_cka(outputs: Float[Tensor, "T E O"]) -> Float[Tensor, "E E"]:
    """||Y_i^T Y_j||² / (||Y_i^T Y_i|| ||Y_j^T Y_j||) of outputs centred over tokens (Kornblith et al. 2019).

    1 for outputs that differ by a rotation and a scale, 0 for unrelated ones; SimSMoE (arXiv 2406.15883) penalises it.
    It holds E · T² numbers, so a few hundred tokens are enough.
    """
    y = outputs.float() - outputs.float().mean(0)
    gram = torch.einsum("tio,sio->its", y, y).flatten(1)  # <Y_i Y_i^T, Y_j Y_j^T> = ||Y_i^T Y_j||²
    return F.normalize(gram, dim=-1) @ F.normalize(gram, dim=-1).T


def similarity(pairs: Float[Tensor, "E E"]) -> Float[Tensor, ""]:
    """The mean over pairs of different experts of a matrix such as `cosine` or `linear_cka` gives; 0 for one expert."""
    num_experts = len(pairs)
    return (pairs.sum() - pairs.trace()) / max(1, num_experts * (num_experts - 1))


def orthogonality(weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
    """Mean over pairs of different router rows of their squared cosine; 0 if all are orthogonal."""
    unit = F.normalize(weight.float(), dim=-1)
    return similarity((unit @ unit.T).square())


def proxies(weight: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
    """Router rows as tokens: row i multiplied by U(1 - ε_i, 1 + ε_i), ε_i = |R_i - R_nearest| / (2 |R_i|).

    Half the way to the nearest other row at most (ERC, arXiv 2512.23447). Each call draws new noise; no gradient.
    """
    row = weight.detach().float()
    distance = torch.cdist(row, row, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(float("inf"))
    epsilon = distance.amin(-1) / (2 * row.norm(dim=-1))
    noise = 1 + epsilon.unsqueeze(-1) * (2 * torch.rand_like(row) - 1)
    return weight.float() * noise


def erc(proxies: Float[Tensor, "E D"], experts: FFN, alpha: float = 1.0) -> Float[Tensor, ""]:
    """Expert-router coupling (ERC, arXiv 2512.23447): row i of the router activates expert i more than any other pair.

        M_ij = |proxy_i W_gate^j|
        L = 1 / E² · Σ_i Σ_{j≠i} max(M_ij - α M_ii, 0) + max(M_ji - α M_ii, 0)

    Costs E² activations, independent of the number of tokens.

    Args:
        proxies: router rows, `proxies(router.weight)` in the paper.
        experts: the experts; M is the norm of the input of their activation, without bias.
        alpha: how much larger the norm of the own expert must be, in [0, 1]: the others stay below α M_ii.
    """
    norms = torch.einsum("id,jhd->ijh", proxies, experts.activated.float()).norm(dim=-1)
    own = alpha * norms.diagonal().unsqueeze(1)  # α M_ii
    excess = (norms - own).relu() + (norms.T - own).relu()
    return (excess.sum() - excess.trace()) / len(norms) ** 2
