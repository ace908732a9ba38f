"""Whole modules as experts: copies of an attention module or of a layer, routed once per sequence."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from moeify.experts.sequences import Sequences
from moeify.find.dense import is_linear, widths
from moeify.find.shapes import Site
from moeify.registry import register


@register("experts", "whole_modules")
def whole_modules(dense: nn.Module, num_experts: int) -> Sequences:
    """Every expert is a copy of a module that needs whole sequences, such as attention or a layer.

    Args:
        dense: any module that is called with tokens (B, N, D) and more; see `where=modules(...)`.
        num_experts: E.
    """
    return Sequences(copy.deepcopy(dense) for _ in range(num_experts))


def of_sequences(site: Site) -> Site:
    """The site of a module that reads whole sequences; its width is the input width of its first linear layer."""
    return replace(site, known_width=next(widths(part)[1] for part in site.dense.modules() if is_linear(part)))
