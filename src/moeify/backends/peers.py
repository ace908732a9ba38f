"""The backends `liger` and `sonicmoe`: fused layers of other libraries, which `auto` never selects."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.backends.base import (
    needs_all_choices,
    needs_dtype,
    needs_no_autocast,
    needs_nvidia,
    needs_one_weight,
    needs_rows_only,
    needs_weights,
    sparse,
)
from moeify.experts.base import Experts
from moeify.kernels.stacked import Glu, Stacked, name_of
from moeify.routing import Assignment, Routing

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def liger(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Float[Tensor, "... D"]:
    """Liger's fused layer: gather, projections and SwiGLU in Triton."""
    tokens, stacked, routing = _read(x, routing, experts)
    function = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction
    assert routing.choices is not None
    return function.apply(
        tokens, stacked.up, stacked.down, routing.choices.indices.int(), routing.choices.weights
    ).view(x.shape)


def cannot_liger(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str | None:
    """The reason why `liger` does not support a call, None if it does."""
    if reason := _unserved(x, routing, experts, ("silu",)):
        return reason
    assert experts.stacked is not None
    if experts.stacked.up_bias is not None or experts.stacked.down_bias is not None:
        return "it does not support biases"
    return _missing("liger_kernel", "liger-kernel")


def sonicmoe(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Float[Tensor, "... D"]:
    """SonicMoE's fused layer, through transformers."""
    tokens, stacked, routing = _read(x, routing, experts)
    assert isinstance(stacked.activation, Glu)
    theirs: Any = SimpleNamespace(
        gate_up_proj=stacked.up, gate_up_proj_bias=stacked.up_bias,
        down_proj=stacked.down, down_proj_bias=stacked.down_bias,
        num_experts=len(stacked.up), has_gate=True, has_bias=stacked.up_bias is not None, has_post_expert_norm=False,
        is_transposed=False, is_concatenated=True, config=SimpleNamespace(hidden_act=name_of(stacked.activation.act)),
    )  # fmt: skip
    forward = importlib.import_module("transformers.integrations.sonicmoe").sonicmoe_experts_forward
    assert routing.choices is not None
    return forward(theirs, tokens, routing.choices.indices, routing.choices.weights).view(x.shape)


def cannot_sonicmoe(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str | None:
    """The reason why `sonicmoe` does not support a call, None if it does."""
    if reason := _unserved(x, routing, experts, ("silu", "gelu", "relu")):
        return reason
    if reason := _missing("transformers", "transformers"):
        return reason
    try:
        importlib.import_module("transformers.integrations.sonicmoe").is_sonicmoe_loadable(raise_error=True)
    except ImportError as reason:
        return str(reason).rstrip(".")
    return None


def _read(x: Tensor, routing: Routing, experts: Experts) -> tuple[Tensor, Stacked, Assignment]:
    assert experts.stacked is not None
    return x.reshape(-1, x.shape[-1]), experts.stacked, sparse(routing)


def _unserved(x: Tensor, routing: Routing, experts: Experts, activations: tuple[str, ...]) -> str | None:
    if reason := needs_one_weight(routing) or needs_rows_only(routing) or needs_all_choices(routing):
        return reason
    s = experts.stacked
    if s is None or not isinstance(s.activation, Glu) or name_of(s.activation.act) not in activations:
        return f"it needs experts gated by {' or '.join(activations)}, gate and up projection side by side"
    if s.down.shape[1] != x.shape[-1] or s.up.stride(-1) != 1:
        return "it needs outputs as wide as tokens, and weights that do not lie transposed"
    tensors = (s.up, s.up_bias, s.down, s.down_bias)
    return (
        needs_nvidia(x) or needs_weights(x, experts, tensors) or needs_no_autocast(x) or needs_dtype(x, DTYPES, tensors)
    )


def _missing(module: str, package: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed; run pip install {package}"
    return None
