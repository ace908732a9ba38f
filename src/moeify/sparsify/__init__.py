"""Dense model -> sparse model: find its feed-forward networks, make experts, put sparse layers in their place."""

from moeify.sparsify.catalogue import catalogue, read_recipe, recipes
from moeify.sparsify.convert import sparsify
from moeify.sparsify.dense import DenseFFN
from moeify.sparsify.find import Site, chosen, every, ffn, last, last_half, modules, named, odd
from moeify.sparsify.make import copies, fresh, masked, splits, with_free
from moeify.sparsify.recipe import Recipe
from moeify.sparsify.shared import dense, frozen, gated, nothing
from moeify.sparsify.store import load, load_weights, save

__all__ = [
    "DenseFFN", "Recipe", "Site", "catalogue", "chosen", "copies", "dense", "every", "ffn", "fresh", "frozen", "gated",
    "last", "last_half", "load", "load_weights", "masked", "modules", "named", "nothing", "odd", "read_recipe",
    "recipes", "save", "sparsify", "splits", "with_free",
]  # fmt: skip
