"""Rewrites of a `ModelSpec`, one per trait: other tensors and traits that compute the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify.export.model_spec import ModelSpec

Rewrite = Callable[[ModelSpec, Any], ModelSpec | None]


def rewritten(spec: ModelSpec, trait: str, wanted: Any) -> ModelSpec | None:
    """The same function with another value of a trait, None if no rewrite is known."""
    return REWRITES[trait](spec, wanted) if trait in REWRITES else None


def _scale(spec: ModelSpec, wanted: float) -> ModelSpec:
    """w · E(x) = E'(x) where the down projection is multiplied by w."""
    ratio = spec["scale"] / wanted
    down = {name: tensor * ratio for name, tensor in spec.each("down").items()}
    return spec.rewritten(f"the scale of the weights, {ratio:g}, is multiplied into the experts", down, scale=wanted)


def _selection_bias(spec: ModelSpec, wanted: bool) -> ModelSpec | None:
    biases = spec.each("selection_bias")
    if wanted:
        router = spec.each("router")
        zeros = {
            name.replace("router", "selection_bias"): torch.zeros(len(weight), device=weight.device)
            for name, weight in router.items()
        }
        return spec.rewritten("a selection bias of zeros is added", zeros, selection_bias=True)
    if any(torch.any(bias != bias[0]) for bias in biases.values()):
        return None
    return spec.without("the selection bias, the same for all experts, is left out", {*biases}, selection_bias=False)


def _shared(spec: ModelSpec, wanted: tuple[str, int] | None) -> ModelSpec | None:
    """Units whose weights are zero add nothing."""
    if wanted is None:
        return None
    kind, width = wanted
    old = spec["shared"]
    if old is not None and (old[0] != kind or old[1] > width):
        return None
    tensors: dict[str, Tensor] = {}
    for i in spec["sparse_layers"]:
        like = spec.tensors[f"layers.{i}.down"]
        down = spec.tensors.get(f"layers.{i}.shared_down", like.new_zeros(spec["width"], 0))
        gate_up = spec.tensors.get(f"layers.{i}.shared_gate_up", like.new_zeros(0, spec["width"]))
        more = width - down.shape[1]
        halves = [F.pad(half, (0, 0, 0, more)) for half in gate_up.chunk(2)] if len(gate_up) else [
            like.new_zeros(width, spec["width"])] * 2  # fmt: skip
        tensors |= {f"layers.{i}.shared_down": F.pad(down, (0, more)), f"layers.{i}.shared_gate_up": torch.cat(halves)}
        if kind == "gated" and old is None:
            tensors[f"layers.{i}.shared_gate"] = like.new_ones(1, spec["width"])  # llama.cpp divides by its product
    what = f"a shared expert of {width} units is added" if old is None else (
        f"the shared expert is padded with zeros, from {old[1]} to {width} units")  # fmt: skip
    return spec.rewritten(what, tensors, shared=wanted)


def _biases(trait: str, projections: tuple[str, ...]) -> Rewrite:
    def rewrite(spec: ModelSpec, wanted: bool) -> ModelSpec | None:
        if spec["latent"] is not None:
            return None  # latent attention has its biases in other projections
        weights = {
            name: tensor
            for name, tensor in spec.tensors.items()
            if name.endswith(tuple(f"{projection}.weight" for projection in projections))
        }
        biases = {
            name.removesuffix("weight") + "bias": tensor.new_zeros(len(tensor)) for name, tensor in weights.items()
        }
        said = ", ".join(projection.removesuffix("_proj") for projection in projections)
        if wanted:
            return spec.rewritten(f"biases of zeros are added to {said}", biases, **{trait: True})
        if any(torch.any(spec.tensors[name]) for name in biases):
            return None
        return spec.without(f"the biases of {said}, all zero, are left out", {*biases}, **{trait: False})

    return rewrite


def _rope_pairs(spec: ModelSpec, wanted: str) -> ModelSpec | None:
    """RoPE rotates pairs of units; reordering rows of the query and key projections changes which units form a pair."""
    if spec["latent"] is not None or spec["query_key_norm"] is not None or spec["rope"]["partial_rotary_factor"] != 1.0:
        return None
    tensors = {
        name: reordered(tensor, spec["head_dim"], wanted)
        for name, tensor in spec.tensors.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"))
    }
    what = "rows of the query and key projections are reordered, since RoPE rotates other pairs of units"
    return spec.rewritten(what, tensors, rope_pairs=wanted)


def reordered(rows: Tensor, head_dim: int, pairs: str) -> Tensor:
    """Rows of queries or keys whose pairs are `halves` (i, i + d/2), as `neighbours` (2i, 2i + 1), or the reverse."""
    split = (2, head_dim // 2) if pairs == "neighbours" else (head_dim // 2, 2)
    return rows.unflatten(0, (-1, *split)).transpose(1, 2).flatten(0, 2).contiguous()


def _tied(spec: ModelSpec, wanted: bool) -> ModelSpec | None:
    if wanted:
        return None
    head = {"lm_head.weight": spec.tensors["model.embed_tokens.weight"].clone()}
    return spec.rewritten("the embeddings are written twice, also as the output projection", head, tied=False)


def _expert_hidden(spec: ModelSpec, wanted: int) -> ModelSpec:
    """Units whose weights are zero add nothing."""
    more = wanted - spec["expert_hidden"]
    down = {name: F.pad(tensor, (0, more)) for name, tensor in spec.each("down").items()}
    up = {
        name: torch.cat([F.pad(half, (0, 0, 0, more)) for half in tensor.chunk(2, dim=1)], dim=1)
        for name, tensor in spec.each("gate_up").items()
    }
    what = f"experts are padded with zeros, from {spec['expert_hidden']} to {wanted} units"
    return spec.rewritten(what, down | up, expert_hidden=wanted)


def _windows(spec: ModelSpec, wanted: None) -> ModelSpec | None:
    if any(window is not None and window < spec["positions"] for window in spec["windows"]):
        return None
    return spec.rewritten("sliding windows, no shorter than the longest text, are left out", windows=wanted)


REWRITES: dict[str, Rewrite] = {
    "scale": _scale,
    "selection_bias": _selection_bias,
    "shared": _shared,
    "qkv_bias": _biases("qkv_bias", ("q_proj", "k_proj", "v_proj")),
    "o_bias": _biases("o_bias", ("o_proj",)),
    "head_bias": _biases("head_bias", ("lm_head",)),
    "rope_pairs": _rope_pairs,
    "windows": _windows,
    "tied": _tied,
    "expert_hidden": _expert_hidden,
}
"""Rewrites by trait."""
