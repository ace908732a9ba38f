"""The contexts of sites: one per stack of layers, with the layout of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from moeify.context import Context
from moeify.find.shapes import Site


def contexts_of(sites: Sequence[Site]) -> dict[str, Context]:
    """A context for each stack, with the layout of its tokens."""
    return {
        site.stack: Context(False if site.sequence_first else None, routes_padding=site.routes_padding)
        for site in sites
    }
