"""Dense model -> sparse model: find its feed-forward networks, make experts, put sparse layers in their place."""

from moeify.sparsify.adapters import lora, lora_ffn
from moeify.sparsify.after import sandwich
from moeify.sparsify.attach import adapters_of
from moeify.sparsify.bake import bake, merge_into_dense
from moeify.sparsify.catalogue import catalogue, read_recipe, recipes
from moeify.sparsify.centroids import set_centroids
from moeify.sparsify.convert import sparsify
from moeify.sparsify.dense import DenseFFN
from moeify.sparsify.find import Site, chosen, every, ffn, last, last_half, linears, modules, named, odd
from moeify.sparsify.gates import load_gates, save_gates, set_gates
from moeify.sparsify.lorahub import compose_adapters, merge_adapters, merge_lora
from moeify.sparsify.make import copies, fresh, masked, merged, splits, with_free
from moeify.sparsify.merge import merge_models
from moeify.sparsify.pool import add_adapter, from_adapters, load_adapters, save_adapters, show_pool
from moeify.sparsify.prompts import expert_names, route_by_examples, through
from moeify.sparsify.recipe import Recipe
from moeify.sparsify.shared import dense, frozen, gated, nothing
from moeify.sparsify.store import load, load_weights, save
from moeify.sparsify.xlora import XLoRA

__all__ = [
    "DenseFFN", "Recipe", "Site", "XLoRA", "adapters_of", "add_adapter", "bake", "catalogue", "chosen",
    "compose_adapters", "copies", "dense", "every", "expert_names", "ffn", "fresh", "from_adapters", "frozen", "gated",
    "last", "last_half", "linears", "load", "load_adapters", "load_gates", "load_weights", "lora", "lora_ffn", "masked",
    "merge_adapters", "merge_into_dense", "merge_lora", "merge_models", "merged", "modules", "named", "nothing", "odd",
    "read_recipe", "recipes", "route_by_examples", "sandwich", "save", "save_adapters", "save_gates", "set_centroids",
    "set_gates", "show_pool", "sparsify", "splits", "through", "with_free",
]  # fmt: skip
