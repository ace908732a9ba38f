"""Sites whose sparse layers route sub-tokens, parts of every token (MH-MoE), and the networks of their experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from moeify.find.dense import DenseFFN, narrowed
from moeify.find.shapes import Site
from moeify.find.where import Where, ffn
from moeify.moe import MoE
from moeify.multihead import MultiHead
from moeify.registry import register


def sub_tokens(heads: int, *, where: Where = ffn) -> Where:
    """The feed-forward networks that `where` chose; their sparse layers read every token in `heads` sub-tokens."""
    return partial(_sub_tokens, heads=heads, where=where)


@register("where", "sub_tokens")
def _sub_tokens(model: nn.Module, heads: int, *, where: Where = ffn) -> list[Site]:
    return [cut(site, heads) for site in where(model)]


def cut(site: Site, heads: int) -> Site:
    """The site, whose sparse layer reads every token in `heads` sub-tokens.

    Raises:
        ValueError: no feed-forward network of one width; a number of heads that does not divide it.
    """
    if not isinstance(site.dense, DenseFFN) or not site.keeps_width:
        raise ValueError(
            f"{site.name} is not a feed-forward network with outputs as wide as its inputs, so sub-tokens could not "
            "be merged again; leave it out of where=sub_tokens(...)"
        )
    if type(heads) is not int or heads < 1 or site.width % heads:
        raise ValueError(
            f"{site.name} reads tokens of width {site.width}, which cannot be cut into {heads!r} heads; choose a "
            "number that divides it"
        )
    return replace(site, heads=heads)


def read_there(site: Site) -> tuple[nn.Module, int]:
    """The network that experts are made of, and the width of their input: D, or D / h for sub-tokens.

    It has all hidden units of the dense one, and of their weights those from and to the first D / h of a token.
    """
    if site.heads == 1:
        return site.dense, site.width
    dense, part = site.dense, site.width // site.heads
    assert isinstance(dense, DenseFFN)
    return narrowed(dense, part), part


def stands_there(site: Site, layer: nn.Module) -> nn.Module:
    """The module that is put into the site: a sparse layer, or a `MultiHead` around one that reads sub-tokens."""
    if site.heads == 1:
        return layer
    assert isinstance(layer, MoE)
    like = next(layer.parameters())
    with torch.device(like.device):
        return MultiHead(layer, site.width, site.heads).to(like.dtype).train(layer.training)
