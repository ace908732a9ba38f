"""Dense model -> sparse model: make experts of its feed-forward networks, and put sparse layers in their places."""

from moeify.sparsify.after import sandwich
from moeify.sparsify.convert import sparsify
from moeify.sparsify.lora import lora, lora_ffn
from moeify.sparsify.make import (
    copies,
    fresh,
    in_latent_space,
    masked,
    merged,
    splits,
    with_free,
    with_multiplicative_bias,
)
from moeify.sparsify.memory import engram
from moeify.sparsify.named import read_recipe, recipes
from moeify.sparsify.narrow import extraction_of_streams, narrow, narrow_of_streams
from moeify.sparsify.plan import Plan, find
from moeify.sparsify.recipe import Recipe
from moeify.sparsify.residual import residual, residual_splits, start_routers
from moeify.sparsify.shared import bias, dense, frozen, gated, nothing
from moeify.sparsify.whole import whole_modules

__all__ = [
    "Plan", "Recipe", "bias", "copies", "dense", "engram", "extraction_of_streams", "find", "fresh", "frozen", "gated",
    "in_latent_space", "lora", "lora_ffn", "masked", "merged", "narrow", "narrow_of_streams", "nothing", "read_recipe",
    "recipes", "residual", "residual_splits", "sandwich", "sparsify", "splits", "start_routers", "whole_modules",
    "with_free", "with_multiplicative_bias",
]  # fmt: skip
