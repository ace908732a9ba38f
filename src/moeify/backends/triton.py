"""The backends `triton` and `decode`: sparse layers on a GPU with `moeify.kernels.triton`, imported at first use."""

from __future__ import annotations

import importlib.util
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify import env
from moeify.backends.base import (
    needs_all_choices,
    needs_no_gradient,
    needs_nvidia,
    needs_one_weight,
    needs_rows_only,
    needs_stacked,
    needs_weights,
    sparse,
)
from moeify.experts.base import Experts
from moeify.experts.lora import LoRA
from moeify.experts.quantized import Quantized
from moeify.kernels.constant import constant_result
from moeify.kernels.stacked import Activation, unsupported_activation
from moeify.routing import Assignment, Routing

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Float[Tensor, "... O"]:
    """One kernel per projection, with gather and activation fused into it, and one for the weighted sum."""
    from moeify.kernels.triton import sparse_adapters, sparse_ffn

    routing = sparse(routing)
    tokens = x.reshape(-1, x.shape[-1])
    decision = routing.source, routing.weight, routing.counts, *rows_by_token(routing)
    if isinstance(experts, LoRA):
        y = sparse_adapters(tokens, experts.lora_A, experts.lora_B, experts.scale, *decision)
    else:
        assert experts.stacked is not None
        y = sparse_ffn(tokens, experts.stacked, *decision)
    return y.view(*x.shape[:-1], y.shape[-1])


def rows_by_token(routing: Assignment) -> tuple[Int[Tensor, "V"], Int[Tensor, "T+1"]]:
    """The rows of token t: `order[begin[t] : begin[t + 1]]`, where -1 marks a dropped or padding row.

    If every token has K experts, it has K entries in `order`, so no sort is needed.
    """
    source, tokens = routing.source, math.prod(routing.shape)
    if routing.rank is None or routing.choices is None:
        begin = source.new_zeros(tokens + 1).index_add(0, source + 1, torch.ones_like(source)).cumsum(0)
        return source.argsort(stable=True), begin
    k = routing.choices.k
    rows = torch.arange(source.shape[0], device=source.device)
    order = source.new_full((tokens * k,), -1).scatter(0, source * k + routing.rank, rows)
    return order, torch.arange(tokens + 1, device=source.device) * k


def cannot(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str | None:
    """The reason why `run` does not support a call, None if it does."""
    if isinstance(experts, LoRA):
        if experts.training and experts.dropout.p > 0:
            return "it does not support dropout before low-rank projections"
    elif reason := needs_stacked(experts):
        return reason
    return _unserved(x, routing, experts)


def chosen(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> bool:
    """Whether `auto` uses these kernels: if allowed, and if expected to be faster than torch's grouped GEMM.

    No GPU has run them yet, so `auto` uses them only with `MOEIFY_TRITON=1` in the environment.

    They avoid copies of rows, whose share of the time is proportional to 1 / D + 1 / H, but CUTLASS GEMMs are somewhat
    faster than Triton's. They are used for D · H / (D + H) <= 1000, so for fine-grained experts and not for wide ones
    such as Mixtral's; low-rank projections are narrower still. In dtypes that torch's grouped GEMM does not support,
    the alternative is one product per expert and a synchronisation for the counts, so they are always used.
    """
    if not allowed() or not x.is_cuda:
        return False
    stacked = experts.stacked
    if stacked is None:
        return isinstance(experts, LoRA)
    (_, width_out, hidden), width = stacked.down.shape, x.shape[-1]
    width = min(width, width_out)
    return _dtype(x, experts) != torch.bfloat16 or width * hidden <= 1000 * (width + hidden)


def decode(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Float[Tensor, "... O"]:
    """Compute a layer for few tokens without gradients, reading the weights of selected experts once, in place."""
    from moeify.kernels.triton.decode import Matrices, decode

    choices = sparse(routing).choices
    assert choices is not None
    indices, weights = choices.indices, choices.weights
    tokens = x.reshape(-1, x.shape[-1]).to(_dtype(x, experts))
    if isinstance(experts, Quantized):
        up, down = (Matrices(p.weight, p.bias, p.scales) for p in (experts.up, experts.down))
        y = decode(tokens, indices, weights, up, down, experts.hidden, experts.activation)
    else:
        s = experts.stacked
        assert s is not None
        up, down = Matrices(s.up, s.up_bias), Matrices(s.down, s.down_bias)  # of any dtype, so autocast makes no copies
        y = decode(tokens, indices, weights, up, down, s.down.shape[2], s.activation)
    return y.view(*x.shape[:-1], y.shape[-1])


def cannot_decode(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str | None:
    """The reason why `decode` does not support a call, None if it does."""
    if not isinstance(experts, Quantized) and (reason := needs_stacked(experts)):
        return reason
    return (
        _unserved(x, routing, experts)
        or needs_all_choices(routing)
        or needs_no_gradient((x, sparse(routing).weight, *experts.parameters()))
    )


def decode_chosen(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> bool:
    """Whether `auto` uses `decode`: if allowed, and if there are at most as many rows as experts."""
    return allowed() and x.is_cuda and routing.num_rows <= routing.counts.shape[0]


@constant_result
def allowed() -> bool:
    """Whether `auto` may use kernels that no GPU has run."""
    return env.TRITON.is_on


def _unserved(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    if reason := needs_one_weight(routing) or needs_rows_only(routing):
        return reason
    activation = _activation(experts)
    if activation is not None and (reason := unsupported_activation(activation)):
        return reason
    dtype = _dtype(x, experts)
    if dtype not in DTYPES:
        return f"it computes in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, and the weights are {dtype}"
    if routing.num_rows >= 2**31 or max(w[0].numel() for w in _matrices(experts)) >= 2**31:
        return "it counts rows, and numbers of one expert, in 31 bits"
    return _missing() or _unfit(x) or needs_weights(x, experts, _tensors(experts))


def _activation(experts: Experts) -> Activation | None:
    if isinstance(experts, Quantized):
        return experts.activation
    return None if experts.stacked is None else experts.stacked.activation


def _matrices(experts: Experts) -> tuple[Tensor, Tensor]:
    if isinstance(experts, LoRA):
        return experts.lora_A, experts.lora_B
    if isinstance(experts, Quantized):
        return experts.up.weight, experts.down.weight
    assert experts.stacked is not None
    return experts.stacked.up, experts.stacked.down


def _dtype(x: Tensor, experts: Experts) -> torch.dtype:
    """The compute dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype if isinstance(experts, Quantized) else _matrices(experts)[0].dtype


def _tensors(experts: Experts) -> tuple[Tensor | None, ...]:
    """The tensors of the experts that the kernels read."""
    if isinstance(experts, LoRA):
        return experts.lora_A, experts.lora_B, experts.scale
    if isinstance(experts, Quantized):
        return tuple(tensor for p in (experts.up, experts.down) for tensor in (p.weight, p.bias, p.scales))
    s = experts.stacked
    return () if s is None else (s.up, s.up_bias, s.down, s.down_bias)


@constant_result
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run pip install 'moeify[gpu]'"
    return None


def _unfit(x: Tensor) -> str | None:
    if not x.is_cuda:
        return None if _interpreted() else needs_nvidia(x)
    if torch.version.hip is not None:
        return "it has been written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


@constant_result
def _interpreted() -> bool:
    from moeify.kernels.triton.launch import INTERPRETED

    return INTERPRETED
