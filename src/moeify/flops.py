"""Parameters and FLOPs, total and active, counted from the module tree: nothing runs, so the meta device is enough.

active = sum over parameters of size · min(share, 1)   share = rows per token / E in experts, 1 elsewhere
FLOPs  = sum over matrices of 2 · size · share         a token multiplies every matrix once
       + sum over attentions of 2 · heads · (query width + value width) · tokens

Rows per token come from the router: k, the factor of expert choice, or E · p slots over N tokens (Soft MoE).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral

from torch import Tensor, nn

from moeify.engram import Engram
from moeify.experts.slices import slices_of
from moeify.given import model_given
from moeify.hf.names import FLAT_WEIGHTS, HEADS, QUERY_WIDTH, VALUE_WIDTH, number
from moeify.layers import sparse_layers
from moeify.multihead import MultiHead
from moeify.routers.base import Router


@dataclass(frozen=True, kw_only=True)
class Count:
    """What a model holds, and what one token uses of it.

    Papers count active parameters with the input embedding (Mixtral, OLMoE, Qwen3) or without it (GPT-OSS,
    DeepSeek-V3). `active_parameters` is with it; without it they are `flops / 2`, but for norms and biases.

    Attributes:
        parameters: all parameters; tied ones, and experts that are trained apart from their stack, count once.
        active_parameters: parameters that one token uses: rows per token / E of the experts' and all others.
        flops: FLOPs of one token's forward pass.
        dense_flops: the same if every expert ran.
    """

    parameters: int
    active_parameters: int
    flops: int
    dense_flops: int

    @property
    def training_flops(self) -> int:
        """FLOPs of one token in a training step: forward once, and twice as much backward."""
        return 3 * self.flops

    def __str__(self) -> str:
        active = self.active_parameters / max(self.parameters, 1)
        return (
            f"{human(self.parameters)} parameters, {human(self.active_parameters)} active per token ({active:.1%})\n"
            f"{human(self.flops, 'G')}FLOPs per token forward, {human(self.dense_flops, 'G')}FLOPs if every expert ran"
        )


def count(model: nn.Module, tokens: int | None = None) -> Count:
    """Count a model's parameters and its forward FLOPs per token, total and active, from its module tree.

    A FLOP is a multiplication or an addition. Matrices are counted; lookups, norms, activations and the moving of
    rows are free. Every module is taken to be passed once per token: in encoder-decoders by one token on either side,
    in vision models by one patch, and a pooler or classifier, which runs once per sequence, as if it ran once per
    token. Experts are taken to be used equally often, so that among experts of different sizes a row costs their mean,
    and among zero, copy and FFN experts the FFN experts' share. The rows of a token come from
    `Router.rows_per_token`: k (without capacity and competitions), the factor of expert choice, E · p / N for
    Soft MoE (1 if `tokens` is not given), and at most that many where the number varies: `max_k` of `TopP`, and all
    experts of `Threshold`, `ReLU` and `ExpertThreshold`. A row also passes what all experts have in common, such as the
    network that MixLoRA's experts change; a token passes the projections of `Latent` experts once. Of NLLB-MoE every
    row counts that transformers computes, E per token.

    Args:
        model: any model, on any device.
        tokens: N, the length of the sequence or image; if given, attention's scores and values are added as if every
            token attended to all of it: causal masks and windows save nothing.

    Raises:
        ValueError: an MoE block of transformers whose number of experts per token is unknown; `tokens` that is no
            length.
    """
    if tokens is not None and not (isinstance(tokens, Integral) and tokens > 0):
        raise ValueError(f"tokens={tokens!r} is no length of a sequence; choose a whole number from 1 on")
    passes = _passes(model)
    shares, slices = _shares(model, passes, tokens), slices_of(model)
    held: dict[Tensor, Fraction] = {}
    flops, dense_flops = Fraction(0), Fraction(0)
    for module in model.modules():
        share, times = shares.get(module, _Share()), passes.get(module, 1)
        for parameter in (p for p in module.parameters(recurse=False) if p not in slices):
            active = min(share.rows * times, Fraction(1)) * _used(module, parameter)
            held[parameter] = max(active, held.get(parameter, Fraction(0)))
        work = 2 * sum(matrix.numel() * _used(module, matrix) for matrix in _matrices(module, module in shares))
        work = times * (work + _mixing(module))
        if tokens is not None:
            work += _attention(module, tokens)
        flops += work * share.rows
        dense_flops += work * share.all_rows
    return Count(
        parameters=sum(parameter.numel() for parameter in held),
        active_parameters=round(sum(parameter.numel() * share for parameter, share in held.items())),
        flops=round(flops),
        dense_flops=round(dense_flops),
    )


def human(number: float, billion: str = "B") -> str:
    """A number in thousands, millions, billions or trillions, as model cards write it: `46.7 B`."""
    for size, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} "


@dataclass(frozen=True)
class _Share:
    """How often one token passes a module, averaged over its stacked parameters: 1 outside experts.

    Attributes:
        rows: by the rows that the routers give it.
        all_rows: if every expert ran.
    """

    rows: Fraction = Fraction(1)
    all_rows: Fraction = Fraction(1)


def _shares(model: nn.Module, passes: dict[nn.Module, int], tokens: int | None) -> dict[nn.Module, _Share]:
    """The share of every module inside experts; those of nested layers multiply.

    A row passes one of E experts, but also the parts that all experts share, such as the network that MixLoRA's
    experts change. A token passes some of these once, such as the projections of `Latent`.
    """
    shares: dict[nn.Module, _Share] = {}
    for layer in sparse_layers(model).values():
        rows = layer.rows_per_token(None if tokens is None else tokens * passes.get(layer.module, 1))
        rows = Fraction(layer.num_experts if rows is None else rows)
        common = {part for module in layer.common_modules() for part in module.modules()}
        once = {part for module in layer.per_token_modules() for part in module.modules()}
        for part in layer.experts.modules():
            experts = 1 if part in common else layer.num_experts
            outer = shares.get(part, _Share())
            if part in once:
                shares[part] = outer
                continue
            shares[part] = _Share(outer.rows * rows / experts, outer.all_rows * layer.num_experts / experts)
    return shares


def _passes(model: nn.Module) -> dict[nn.Module, int]:
    """How often one token passes a module: h times inside a multi-head layer, in h parts; once elsewhere."""
    layers = [module for module in model_given(model).modules() if isinstance(module, MultiHead)]
    return {part: layer.heads for layer in layers for part in layer.moe.modules()}


def _matrices(module: nn.Module, in_experts: bool) -> Iterator[Tensor]:
    """The matrices that a token is multiplied by: weights of two or more dimensions, and those of experts, (E, ., .).

    Embeddings among experts (Doge) are rows of matrices; elsewhere a lookup costs nothing. A router's tables are all
    matrices under any name, unless they hold no real numbers.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not in_experts:
        return
    if isinstance(module, Router):
        tables = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        yield from (table for table in tables if table.dim() >= 2 and table.is_floating_point())
        return
    for name, parameter in module.named_parameters(recurse=False):
        stacked = in_experts and (parameter.dim() >= 3 or name in FLAT_WEIGHTS)
        if (parameter.dim() >= 2 and "weight" in name) or stacked:
            yield parameter


def _used(module: nn.Module, parameter: Tensor) -> Fraction:
    """The share of a parameter that tokens use: a row of each table of an Engram.

    LongCat stacks an up projection, but no down one, for zero experts.
    """
    if isinstance(module, Engram) and parameter is module.table:
        return Fraction(module.tables, len(parameter))
    down = module._parameters.get("down_proj")
    working = 0 if down is None or down.dim() < 3 else len(down)
    return Fraction(working, len(parameter)) if 0 < working < len(parameter) else Fraction(1)


def _mixing(module: nn.Module) -> int:
    return module.mixing_flops if isinstance(module, Router) else 0


def _attention(module: nn.Module, tokens: int) -> int:
    """FLOPs of one token's scores and values in a module that is called attention and has the width of its heads."""
    query, value = number(module, QUERY_WIDTH), number(module, VALUE_WIDTH)
    heads = number(module, HEADS) or number(getattr(module, "config", None), HEADS)
    if "Attention" not in type(module).__name__ or not (heads and query and value):
        return 0
    return int(2 * heads * (query + value) * tokens)
