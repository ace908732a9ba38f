"""The settings of each sparse layer for the modelling file, if its plain PyTorch code supports them."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify import registry
from moeify.experts.ffn import FFN
from moeify.kernels.stacked import Glu, Plain
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers.base import Router
from moeify.routers.competition import Compete
from moeify.routers.expert_groups import ExpertGroups
from moeify.routers.noisy import NoisyTopK
from moeify.routers.topk import TopK
from moeify.sparsify.shared import dense, frozen, gated, nothing
from moeify.store.standalone import SCORES

_SHARED = {nothing: "nothing", dense: "dense", frozen: "frozen", gated: "gated"}


def standalone_layers(model: nn.Module) -> list[dict[str, Any]] | None:
    """The settings of each sparse layer for `moeify.store.standalone`; None if it does not support one of them."""
    origin = Origin.of(model)
    if origin.sites is None or origin.recipe.after is not nothing or origin.recipe.shared not in _SHARED:
        return None
    if getattr(origin.recipe.experts, "keywords", {}).get("activation") is not None:
        return None
    shared = _SHARED[origin.recipe.shared]
    layers = [_settings(model, site) for site in origin.sites]
    return [layer | {"shared": shared} for layer in layers if layer is not None] if None not in layers else None


def _settings(model: nn.Module, site: dict[str, Any]) -> dict[str, Any] | None:
    layer = model.get_submodule(site["name"])
    layer = layer[0] if isinstance(layer, nn.Sequential) and site.get("after") else layer
    if not isinstance(layer, MoE) or layer.memory is not None or "up" not in site or type(layer.experts) is not FFN:
        return None
    experts, router = layer.experts, _router_settings(layer.router)
    if router is None or not isinstance(experts.activation, Plain | Glu):
        return None
    sizes = {"hidden": experts.hidden, "width_out": experts.width_out, "bias": experts.down[1] is not None}
    return {
        "num_experts": experts.num_experts,
        "router": router,
        "experts": sizes,
        "dropout": experts.dropout.p,
    }


def _router_settings(router: Router) -> dict[str, Any] | None:
    """The settings of a `standalone.Router` with the same routing decisions in evaluation, None if there is none."""
    if isinstance(router, TopK) and router.per == "token":
        return _topk_settings(router)
    if isinstance(router, Compete):
        return _SOFTMAX | {"k": router.k, "normalize": True}
    if isinstance(router, NoisyTopK) and router.noise_weight is None and router.hidden_weight is None:
        return _SOFTMAX | {"k": router.k, "normalize": router.order == "select"}
    return None


_SOFTMAX: dict[str, Any] = {
    "score": "softmax", "select": "score", "scale": 1.0, "bias": False, "selection_bias": False, "expert_groups": None,
}  # fmt: skip


def _topk_settings(router: TopK) -> dict[str, Any] | None:
    score = next((name for name in SCORES if registry.lookup("score", name) is router.score), None)
    groups = router.expert_groups
    if score is None or (groups is not None and not isinstance(groups, ExpertGroups)):
        return None
    if groups is not None and groups.fill != float("-inf"):
        return None
    return {
        "k": router.k,
        "score": score,
        "select": router.select,
        "normalize": router.normalize,
        "scale": router.scale,
        "bias": router.bias is not None,
        "selection_bias": router.selection_bias is not None,
        "expert_groups": groups and {"count": groups.count, "keep": groups.keep, "reduce": groups.reduce},
    }
