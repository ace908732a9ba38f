"""Compose one model from several: dense models become experts, and LoRA adapters become experts behind routers.

from_adapters(base, {name: folder}, router)    adapters of PEFT -> experts beside the base's linear layers
combine_adapters(model, weights)               E adapters -> one adapter
combine_adapters_by_search(model, loss)        the same, with weights that LoraHub's search finds
merge_into_base(model, weights)                adapters under fixed weights -> one dense model
merge_into_experts(model)                      LoRA experts of whole networks -> experts with full weights
merge_models({name: model})                    E dense models -> one sparse model
calibrate_routers(model, sources, data)        routers of merged sparse models -> those nearest to all of theirs
"""

from moeify.compose.adapter_gates import load_gates, save_gates, set_gates
from moeify.compose.adapter_library import add_adapter, from_adapters, load_adapters, save_adapters, show_adapters
from moeify.compose.attach import adapters_of
from moeify.compose.centroids import set_centroids
from moeify.compose.clusters import Clusters, MeanPooling, cluster
from moeify.compose.combine import combine_adapters, combine_adapters_by_search, combine_lora
from moeify.compose.merge import merge_models
from moeify.compose.merge_weights import merge_into_base, merge_into_experts
from moeify.compose.router_calibration import calibrate_routers
from moeify.compose.router_init import expert_names, route_all_to, route_by_examples
from moeify.compose.xlora import XLoRA

__all__ = [
    "Clusters", "MeanPooling", "XLoRA", "adapters_of", "add_adapter", "calibrate_routers", "cluster",
    "combine_adapters", "combine_adapters_by_search", "combine_lora", "expert_names", "from_adapters", "load_adapters",
    "load_gates", "merge_into_base", "merge_into_experts", "merge_models", "route_all_to", "route_by_examples",
    "save_adapters", "save_gates", "set_centroids", "set_gates", "show_adapters",
]  # fmt: skip
