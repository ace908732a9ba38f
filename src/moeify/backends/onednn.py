"""The backends `onednn` and `recompute`: feed-forward experts on a CPU with gradients, by grouped GEMMs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.backends.base import (
    needs_cpu,
    needs_no_transform,
    needs_one_weight,
    needs_rows_only,
    needs_stacked,
    needs_weights,
    sparse,
)
from moeify.experts.base import Experts
from moeify.kernels.cpu.huge_pages import in_place
from moeify.kernels.cpu.layer import infer_layer, run_layer
from moeify.kernels.cpu.onednn import can_pack, packed
from moeify.kernels.cpu.packing import may_pack
from moeify.kernels.cpu.segments import Matrices
from moeify.kernels.stacked import Stacked
from moeify.routing import Routing


def run(x: Float[Tensor, "... D"], routing: Routing, experts: Experts, *, keep: bool = True) -> Tensor:
    """Compute the layer in blocks of a few hundred rows, with packed weights where `pack` allows it.

    Args:
        x: the tokens.
        routing: the routing decision.
        experts: the experts.
        keep: save the inputs of the activation for the backward pass instead of recomputing them.
    """
    routing = sparse(routing)
    stacked = experts.stacked
    assert stacked is not None
    in_place(stacked.up)
    in_place(stacked.down)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else stacked.up.dtype
    tokens = x.reshape(-1, x.shape[-1])
    learned = (x, routing.weight, stacked.up, stacked.up_bias, stacked.down, stacked.down_bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in learned):
        y = run_layer(tokens, routing.source, routing.weight, routing.counts, stacked, dtype, keep=keep)
    else:
        matrices = _packed(stacked, dtype) if may_pack(experts) and can_pack(dtype) else None
        counts = routing.counts.tolist()
        y = infer_layer(tokens, routing.source, routing.weight, counts, stacked, dtype, packed=matrices)
    return y.view(*routing.shape, y.shape[-1])


def _packed(stacked: Stacked, dtype: torch.dtype) -> tuple[Matrices, Matrices] | None:
    if stacked.up.is_inference() or stacked.down.is_inference():  # no version counter to detect stale copies
        return None
    return packed(stacked.up, dtype), packed(stacked.down, dtype)


def refuse(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why this backend does not support a call, None if it does."""
    if torch.compiler.is_compiling():
        return "torch.compile follows the definition and fuses what lies around its products"
    if reason := needs_cpu(x) or needs_one_weight(routing) or needs_rows_only(routing) or needs_stacked(experts):
        return reason
    s = experts.stacked
    assert s is not None
    act = getattr(s.activation, "act", None)
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return "it needs an activation without parameters"
    return needs_no_transform() or needs_weights(x, experts, (s.up, s.up_bias, s.down, s.down_bias))
