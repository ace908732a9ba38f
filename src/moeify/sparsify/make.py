"""Make experts of a dense module: copies of it, parts of it, or fresh ones of its architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.experts.blocks import Blocks, Each, Identity, Zero
from moeify.experts.constant import Constant
from moeify.experts.ffn import FFN
from moeify.experts.latent import Latent
from moeify.experts.masked import Masked
from moeify.experts.multiplicative_bias import MultiplicativeBias
from moeify.experts.scaled import Scaled
from moeify.find.dense import DenseFFN, narrowed
from moeify.kernels.stacked import Activation
from moeify.registry import register
from moeify.sparsify.split.random import random


@register("experts", "copies")
@torch.no_grad()
def copies(dense: nn.Module, num_experts: int, *, noise: float = 0.0, drop: float = 0.0, scale: float = 1.0) -> Experts:
    """Every expert is a copy of the dense network (sparse upcycling, arXiv 2212.05055).

    Args:
        dense: a `DenseFFN`, or any module from (R, D) to (R, O).
        num_experts: E.
        noise: add Gaussian noise of this share of each matrix's standard deviation, so that the copies differ.
        drop: re-initialise this share of the hidden units of every copy, with the mean and standard deviation of the
            weights they replace (drop-upcycling, arXiv 2502.19261).
        scale: multiplies the outputs; needed where the router's weights do not sum to 1.

    Raises:
        ValueError: options other than noise for a module that is no `DenseFFN`; a share that is none.
    """
    if not (0 <= noise < math.inf and 0 <= drop <= 1):
        raise ValueError(f"noise={noise} and drop={drop} are shares: choose noise >= 0 and 0 <= drop <= 1")
    if not isinstance(dense, DenseFFN):
        if drop or scale != 1.0:
            raise ValueError(f"drop and scale need a feed-forward network, and this is a {type(dense).__name__}")
        experts: Experts = Each(copy.deepcopy(dense) for _ in range(num_experts))
    else:
        experts = _like(dense, num_experts, dense.hidden)
        _fill(experts, dense, [torch.arange(dense.hidden)] * num_experts, scale)
        for e in range(num_experts if drop else 0):
            _redraw(experts, e, torch.randperm(dense.hidden)[: round(drop * dense.hidden)])
    for name, weight in experts.named_parameters() if noise else ():
        if weight.dim() > 1 and not name.endswith("bias"):  # biases are stacked too
            weight.add_(torch.randn_like(weight) * weight.std() * noise)
    return experts


@register("experts", "merged")
def merged(dense: nn.Module, num_experts: int, *, names: Sequence[str] = ()) -> Experts:
    """One expert per model: copies of the dense network, which `merge_models` and `load` then overwrite.

    Args:
        dense: a `DenseFFN`, or any module from (R, D) to (R, O).
        num_experts: E.
        names: the models' names, in the order of the experts.

    Raises:
        ValueError: not one name per expert.
    """
    if len(names) != num_experts:
        raise ValueError(f"{num_experts} experts of {len(names)} models ({', '.join(names)}); give one name per expert")
    return copies(dense, num_experts)


@register("experts", "splits")
@torch.no_grad()
def splits(
    dense: nn.Module,
    num_experts: int,
    *,
    split: Callable[[DenseFFN, int], Tensor] | None = None,
    scale: float | None = None,
) -> Experts:
    """The experts divide the hidden units of the dense network among them (LLaMA-MoE, arXiv 2406.16554).

    The experts' outputs add up to the dense network's; with weights that sum to 1 each must count E-fold for that.

    Args:
        dense: a `DenseFFN`.
        num_experts: E; must divide H.
        split: which hidden units go to which expert, a function of `moeify.sparsify.split`; `random` if not given.
        scale: multiplies the outputs, E if not given.

    Raises:
        ValueError: E does not divide H, or the module is no `DenseFFN`.
    """
    if not isinstance(dense, DenseFFN):
        raise ValueError(f"only a feed-forward network can be split, and this is a {type(dense).__name__}; use copies")
    if dense.hidden % num_experts:
        near = [n for n in range(2, 4 * num_experts) if dense.hidden % n == 0]
        raise ValueError(
            f"{dense.hidden} hidden units cannot be split into {num_experts} equal experts; "
            f"these numbers of experts can: {', '.join(map(str, near)) or 'none near'}"
        )
    split = random if split is None or dense.down_weight.is_meta else split  # there are no values to split by
    experts = of_units(dense, split(dense, num_experts), num_experts if scale is None else scale)
    if experts.down[1] is not None:
        experts.down[1].div_(num_experts)
    return experts


def of_units(dense: DenseFFN, units: Int[Tensor, "E h"], scale: float) -> FFN:
    """Experts of the given hidden units each, the outputs of each multiplied by `scale`."""
    experts = _like(dense, len(units), units.shape[1])
    _fill(experts, dense, list(units), scale)
    return experts


@register("experts", "fresh")
@torch.no_grad()
def fresh(
    dense: nn.Module,
    num_experts: int,
    *,
    granularity: int = 1,
    hidden: int | None = None,
    variance: float | None = None,
    zero: bool = False,
    identical: bool = False,
    activation: Activation | None = None,
    bias: bool | None = None,
) -> Experts:
    """Experts of the dense network's architecture, drawn with the standard deviation of its weights; biases start at 0.

    Args:
        dense: a `DenseFFN`, or a module whose parts can reset their parameters.
        num_experts: E.
        granularity: divides the hidden width: m times finer experts (DeepSeekMoE).
        hidden: the hidden width itself.
        variance: s; draw every matrix from a normal distribution of standard deviation sqrt(s / columns), cut off at
            twice that, instead. Switch found s = 0.1 to be stable (arXiv 2101.03961, section 2.4).
        zero: start with a down projection of zeros, so that the layer starts as its shared module alone.
        identical: draw one expert and start all as copies of it (V-MoE); the router alone makes them differ.
        activation: of the experts, that of the dense network if not given.
        bias: whether the projections have biases; as those of the dense network if not given.

    Raises:
        ValueError: sizes, an activation or biases for a module that is no `DenseFFN`; a granularity that does not
            divide H.
    """
    if not isinstance(dense, DenseFFN):
        if granularity != 1 or hidden is not None or variance is not None or zero or activation or bias is not None:
            raise ValueError(
                f"sizes, activation and bias need a feed-forward network, and this is a {type(dense).__name__}"
            )
        each = Each(copy.deepcopy(dense) for _ in range(num_experts))
        for part in each.modules():
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        if identical:
            for expert in each.experts[1:]:
                expert.load_state_dict(each.experts[0].state_dict())
        return each
    if hidden is None and dense.hidden % granularity:
        raise ValueError(f"a granularity of {granularity} does not divide the {dense.hidden} hidden units")
    hidden = dense.hidden // granularity if hidden is None else hidden
    experts = _like(dense, num_experts, hidden, activation, bias)
    for (weight, offset), old in ((experts.up, dense.up_weight), (experts.down, dense.down_weight)):
        draw(weight, old, variance)
        if offset is not None:
            offset.zero_()
    if zero:
        experts.down[0].zero_()
    if identical:
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return experts


@register("experts", "masked")
def masked(
    dense: nn.Module,
    num_experts: int,
    *,
    experts: Callable[[nn.Module, int], Experts] = fresh,
    p: float = 0.2,
) -> Experts:
    """Experts whose outputs are dropped with probability p in training (NLLB): `Masked` around what `experts` makes.

    Args:
        dense: the dense module.
        num_experts: E.
        experts: makes the experts.
        p: probability that an output is dropped.
    """
    return Masked(experts(dense, num_experts), p)


@register("experts", "multiplicative_bias")
def with_multiplicative_bias(
    dense: nn.Module, num_experts: int, *, experts: Callable[[nn.Module, int], Experts] = fresh
) -> Experts:
    """Experts whose hidden units a learned vector multiplies (ST-MoE): `MultiplicativeBias` around those of `experts`.

    Args:
        dense: a `DenseFFN`.
        num_experts: E.
        experts: makes the experts.

    Raises:
        ValueError: the experts have no hidden units of their own, as low-rank ones.
    """
    made = experts(dense, num_experts)
    if not isinstance(made, FFN):
        raise ValueError(
            f"a multiplicative bias stands between the halves of feed-forward experts, and these are "
            f"{type(made).__name__}; use experts=fresh or copies inside"
        )
    return MultiplicativeBias(made)


@register("experts", "with_free")
def with_free(
    dense: nn.Module,
    num_experts: int,
    *,
    experts: Callable[[nn.Module, int], Experts] = fresh,
    zero: int = 1,
    copy: int = 1,
    constant: int = 2,
    scale: float = 1.0,
) -> Experts:
    """The last experts have no FFN: they output a learned vector, the token, or 0, in this order (MoE++, 2410.07348).

    Args:
        dense: a `DenseFFN` with outputs as wide as its inputs.
        num_experts: E, those without computation included.
        experts: makes the others.
        zero: how many `Zero` experts.
        copy: how many `Identity` experts.
        constant: how many `Constant` experts.
        scale: multiplies what all of them read; the authors' code takes k, 2.

    Raises:
        ValueError: no FFN expert is left, or a module that is no `DenseFFN` with O = D.
    """
    free = zero + copy + constant
    if free >= num_experts:
        raise ValueError(f"{free} free experts leave none of {num_experts} that works; take more experts")
    if not isinstance(dense, DenseFFN) or dense.width != dense.width_out:
        raise ValueError(
            "free experts have outputs as wide as their inputs, so they need a feed-forward network that does too"
        )
    like = dense.down_weight
    with torch.device(like.device):
        groups = [(partial(Constant, width=dense.width), constant), (Identity, copy), (Zero, zero)]
        blocks = Blocks(
            [experts(dense, num_experts - free), *(group(count).to(like.dtype) for group, count in groups if count)]
        )
    return blocks if scale == 1.0 else Scaled(blocks, scale)


@register("experts", "latent")
def in_latent_space(
    dense: nn.Module, num_experts: int, *, factor: int = 4, experts: Callable[[nn.Module, int], Experts] = fresh
) -> Experts:
    """Experts between a projection of tokens to width D / factor and one back (LatentMoE): `Latent` around `experts`.

    At an equal number of weights per token there may be `factor` times as many experts, of which a token uses `factor`
    times as many.

    Args:
        dense: a `DenseFFN` with outputs as wide as its inputs.
        num_experts: E.
        factor: divides D.
        experts: makes the experts, of a network with all hidden units of the dense one that reads D / factor numbers.

    Raises:
        ValueError: a module that is no `DenseFFN` with O = D; a factor that does not divide D.
    """
    if not isinstance(dense, DenseFFN) or dense.width != dense.width_out:
        raise ValueError("a latent space needs a feed-forward network with outputs as wide as its inputs")
    if factor < 1 or dense.width % factor:
        raise ValueError(f"a width of {dense.width} cannot be divided by factor={factor}")
    latent = dense.width // factor
    made = experts(narrowed(dense, latent), num_experts)
    with torch.device(dense.down_weight.device):
        return Latent(made, dense.width, latent).to(dense.down_weight.dtype)


def draw(weight: Tensor, like: Tensor, variance: float | None) -> None:
    """Draw a matrix, or a stack of them, with the standard deviation of another, or by its columns (see `fresh`)."""
    if variance is None:
        weight.normal_(0.0, like.float().std().item() if not like.is_meta else 0.02)
    else:
        std = (variance / weight.shape[-1]) ** 0.5
        weight.copy_(nn.init.trunc_normal_(torch.empty_like(weight, dtype=torch.float32), 0, std, -2 * std, 2 * std))


def _like(
    dense: DenseFFN, num_experts: int, hidden: int, activation: Activation | None = None, bias: bool | None = None
) -> FFN:
    old = dense.down_weight
    has_bias = dense.down_bias is not None or dense.up_bias is not None
    with torch.device(old.device):
        experts = FFN(
            num_experts, dense.width, hidden,
            activation=activation or dense.activation, bias=has_bias if bias is None else bias,
            width_out=dense.width_out, dropout=dense.dropout.p,
        )  # fmt: skip
    return experts.to(old.dtype)


def _fill(experts: FFN, dense: DenseFFN, units: list[Int[Tensor, "H"]], scale: float) -> None:
    """Give expert e the hidden units `units[e]` of the dense network."""
    (up, up_bias), (down, down_bias) = experts.up, experts.down
    projections = dense.activation.projections
    old_up = dense.up_weight.unflatten(0, (projections, -1))  # (projections, H, D)
    for e, chosen in enumerate(units):
        chosen = chosen.to(down.device)
        up[e] = old_up[:, chosen].flatten(0, 1)
        down[e] = dense.down_weight[:, chosen] * scale
        if up_bias is not None:
            old = dense.up_bias
            up_bias[e] = 0 if old is None else old.unflatten(0, (projections, -1))[:, chosen].flatten()
        if down_bias is not None:
            down_bias[e] = 0 if dense.down_bias is None else dense.down_bias * scale


def _redraw(experts: FFN, e: int, units: Int[Tensor, "h"]) -> None:
    (up, _), (down, _) = experts.up, experts.down
    units = units.to(down.device)
    for matrix in (*up[e].unflatten(0, (experts.activation.projections, -1)), down[e].t()):  # each (H, .)
        old = matrix[units]
        matrix[units] = torch.randn_like(old) * old.std() + old.mean()
