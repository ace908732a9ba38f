"""The operations ("steps") of a decoder for the C++ kernel, from embeddings to logits, one new token per sequence.

Activations between steps are fp32 in buffers (T, width), one row per sequence. A step stores pointers to its tensors
and holds no reference to them: the caller must keep the tensors alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.cpu.cpp.build import library
from moeify.kernels.cpu.cpp.call import stack
from moeify.kernels.cpu.cpp.structs import ACTIVATIONS, GATING, Call, Stack

SCORES = ["softmax", "sigmoid", "sqrt_softplus"]
_KINDS = ["norm", "linear", "rotate", "attend", "gated_activation", "experts"]


class Step(ctypes.Structure):
    """The C struct of one step."""

    _fields_ = (
        ("kind", c_int32), ("is_bf16", c_int32), ("adds", c_int32), ("heads", c_int32), ("kv_heads", c_int32),
        ("gating", c_int32), ("activation", c_int32),
        ("score", c_int32), ("by_logit", c_int32), ("normalize", c_int32), ("k", c_int32),
        ("eps", c_float), ("scale", c_float),
        ("x", c_void_p), ("x2", c_void_p), ("x3", c_void_p), ("y", c_void_p),
        ("width", c_int64), ("width_out", c_int64), ("gain", c_void_p), ("weights", Stack), ("call", c_void_p),
    )  # fmt: skip


class LayerCache(ctypes.Structure):
    """The memory of one layer's preallocated keys and values."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64))


class _Turn(ctypes.Structure):
    _fields_ = (
        ("steps", c_void_p), ("count", c_int64), ("tokens", c_int64),
        ("cos", c_void_p), ("sin", c_void_p), ("rotated", c_int64),
        ("caches", c_void_p), ("length", c_int64), ("first", c_void_p), ("threads", c_int32),
    )  # fmt: skip


def _step(kind: str, **fields: object) -> Step:
    pointers = {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
    return Step(kind=_KINDS.index(kind), **pointers)


def norm(x: Float[Tensor, "T M"], y: Float[Tensor, "T M"], gain: Float[Tensor, "D"], eps: float) -> Step:
    """RMSNorm `y = x / rms(x) · gain`, applied to each run of D elements: a head, or the full width."""
    return _step("norm", x=x, y=y, gain=gain, eps=eps, width=len(gain), heads=x.shape[1] // len(gain))


def linear(
    x: Float[Tensor, "T D"],
    y: Float[Tensor, "T O"],
    weight: Tensor,
    *,
    scales: Tensor | None = None,
    group_size: int = 0,
    bias: Float[Tensor, "1 O"] | None = None,
    dtype: torch.dtype,
    adds: bool = False,
) -> Step:
    """`y = W x + bias`, or `y += W x + bias`.

    Args:
        x: the input.
        y: the output.
        weight: (1, O, D) in `dtype`, or quantised as in `moeify.experts.quantized`.
        scales: the scales of an int8 or int4 weight.
        group_size: int4 weights that share a scale.
        bias: in `dtype`.
        dtype: the compute dtype, fp32 or bf16.
        adds: accumulate into y.
    """
    return _step(
        "linear", x=x, y=y, width=x.shape[1], width_out=y.shape[1], adds=adds, is_bf16=dtype == torch.bfloat16,
        weights=stack(weight, bias, scales, group_size),
    )  # fmt: skip


def rotate(x: Float[Tensor, "T M"], head: int) -> Step:
    """Apply rotary position embeddings (RoPE) to heads of dimension `head`; in place."""
    return _step("rotate", y=x, width=head, heads=x.shape[1] // head)


def attend(
    q: Float[Tensor, "T Q"],
    k: Float[Tensor, "T V"],
    v: Float[Tensor, "T V"],
    y: Float[Tensor, "T Q"],
    *,
    head: int,
    scale: float,
    dtype: torch.dtype,
) -> Step:
    """Append k and v to the layer's KV cache, in `dtype`, and attend to all its positions; head dimension `head`."""
    return _step(
        "attend", x=q, x2=k, x3=v, y=y, width=head, scale=scale, is_bf16=dtype == torch.bfloat16,
        heads=q.shape[1] // head, kv_heads=k.shape[1] // head,
    )  # fmt: skip


def attends(step: Step) -> bool:
    """Whether a step is `attend`, which needs a KV cache."""
    return step.kind == _KINDS.index("attend")


def gated_activation(
    gate: Float[Tensor, "T H"], up: Float[Tensor, "T H"] | None, y: Float[Tensor, "T H"], activation: str
) -> Step:
    """`y = act(gate) · up`, or `act(gate)` without up; `activation` is a name of `moeify.kernels.stacked.KNOWN`."""
    gating = GATING.index("plain" if up is None else "glu")
    return _step(
        "gated_activation",
        x=gate,
        x2=up,
        y=y,
        width=gate.shape[1],
        gating=gating,
        activation=ACTIVATIONS.index(activation),
    )


class Experts:
    """The experts of a sparse layer as C structs, for `experts`.

    Args:
        width: D.
        up: weight (E, M, D), bias and scales of the up projection, as for `cpp_layer`.
        down: weight (E, O, H), bias and scales of the down projection.
        hidden: H, the number of hidden units per expert.
        group_size: int4 weights that share a scale.
        gating: "plain", "glu" or "clamped".
        activation: a name of `moeify.kernels.stacked.KNOWN`.
        alpha: of "clamped".
        limit: of "clamped".
    """

    def __init__(
        self,
        width: int,
        up: tuple[Tensor, Tensor | None, Tensor | None],
        down: tuple[Tensor, Tensor | None, Tensor | None],
        hidden: int,
        group_size: int,
        gating: str,
        activation: str,
        alpha: float,
        limit: float,
    ) -> None:
        self.tensors = up, down
        self.call = Call(
            experts=len(up[0]), width=width, hidden=hidden, width_out=down[0].shape[1],
            up=stack(*up, group_size), down=stack(*down, group_size),
            gating=GATING.index(gating), activation=ACTIVATIONS.index(activation), alpha=alpha, limit=limit,
        )  # fmt: skip


def experts(
    x: Float[Tensor, "T D"],
    logits: Float[Tensor, "T E"],
    y: Float[Tensor, "T D"],
    layer: Experts,
    *,
    k: int,
    score: str,
    by_logit: bool,
    bias: Float[Tensor, "E"] | None,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> Step:
    """Add the weighted outputs of every token's top-k experts to y, selected as in `moeify.routers.TopK`."""
    return _step(
        "experts", x=x, x2=logits, y=y, call=ctypes.addressof(layer.call), k=k, score=SCORES.index(score),
        by_logit=by_logit, gain=bias, normalize=normalize, scale=scale, is_bf16=dtype == torch.bfloat16,
    )  # fmt: skip


def run_steps(
    steps: Sequence[Step] | ctypes.Array[Step],
    tokens: int,
    *,
    angles: tuple[Float[Tensor, "T A"], Float[Tensor, "T A"]] | None = None,
    caches: Sequence[LayerCache] = (),
    length: int = 0,
    first: Int[Tensor, "T"] | None = None,
) -> None:
    """Run steps in order.

    Args:
        steps: the steps; a ctypes array of them costs no copy.
        tokens: T.
        angles: cosine and sine of the rotary position embeddings, fp32.
        caches: one per `attend`, in order.
        length: positions in the caches before this step.
        first: the first position of every sequence that is not padding.

    Raises:
        Unavailable: the C++ kernels are not available.
    """
    listed = steps if isinstance(steps, ctypes.Array) else (Step * len(steps))(*steps)
    places = (LayerCache * len(caches))(*caches)
    cos, sin = (None, None) if angles is None else angles
    turn = _Turn(
        ctypes.addressof(listed), len(listed), tokens,
        None if cos is None else cos.data_ptr(), None if sin is None else sin.data_ptr(),
        0 if cos is None else cos.shape[-1],
        ctypes.addressof(places), length, None if first is None else first.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    library().moeify_steps(ctypes.byref(turn))
