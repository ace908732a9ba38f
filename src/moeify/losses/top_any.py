"""Keep the weight rows of a top-any router orthogonal and small, so that tokens pass few thresholds (DynMoE)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.routing import Routing


def diversity_and_simplicity(routing: Routing) -> Float[Tensor, ""]:
    """|| W̄ W̄ᵀ - I ||_F + 1 / E · Σ_e ||w_e||, of the rows w_e of experts in use (DynMoE, arXiv 2405.14297).

    W̄ has the rows of length 1. The authors' code divides the second sum by the largest number of experts, E.

    Raises:
        ValueError: the decision is not one of `moeify.routers.TopAny`.
    """
    rows = routing.evidence.rows
    if rows is None:
        raise ValueError("this decision keeps no rows of its router; diversity_and_simplicity is for TopAny")
    unit = F.normalize(rows.float(), dim=-1)
    return (unit @ unit.T - torch.eye(len(unit), device=unit.device)).norm() + rows.float().norm(dim=-1).mean()
