"""Several models into one: dense models as experts, and libraries of LoRA adapters behind routers."""

from moeify.compose.adapter_gates import load_gates, save_gates, set_gates
from moeify.compose.attach import adapters_of
from moeify.compose.bake import bake, merge_into_dense
from moeify.compose.centroids import set_centroids
from moeify.compose.clusters import Clusters, Pooled, cluster
from moeify.compose.library import add_adapter, from_adapters, load_adapters, save_adapters, show_pool
from moeify.compose.lorahub import compose_adapters, merge_adapters, merge_lora
from moeify.compose.merge import merge_models
from moeify.compose.router_init import expert_names, route_by_examples, through
from moeify.compose.xlora import XLoRA

__all__ = [
    "Clusters", "Pooled", "XLoRA", "adapters_of", "add_adapter", "bake", "cluster", "compose_adapters", "expert_names",
    "from_adapters", "load_adapters", "load_gates", "merge_adapters", "merge_into_dense", "merge_lora", "merge_models",
    "route_by_examples", "save_adapters", "save_gates", "set_centroids", "set_gates", "show_pool", "through",
]  # fmt: skip
