"""How vLLM runs the modelling file of a saved model by its transformers backend, and the fields of the config it reads.

Read in vLLM 0.33: `model_executor/models/transformers/moe.py` and `fusers/moe.py`. A config with a number of experts
makes it replace every module `experts` whose parameters are stacks by its own kernel, which computes a SiLU-gated
network; a router of the form `topk(softmax or sigmoid(linear))` is replaced, too. Without that number it runs the
layers as they are written.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify.kernels.stacked import Glu, name_of
from moeify.layers import moe_layers
from moeify.store.standalone_layers import standalone_layers

FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "routed_scaling_factor", "n_group",
    "topk_group",
)  # fmt: skip
"""The fields of a config that vLLM reads."""

FUSED, OWN_ROUTER, AS_WRITTEN = "fused", "own router, fused experts", "as written"


def vllm_routing(model: nn.Module) -> str:
    """How vLLM's transformers backend runs the sparse layers of a saved model.

    Returns:
        `fused`: router and experts are vLLM's kernels; `own router, fused experts`: the router of the modelling file
        beside vLLM's experts; `as written`: the layers of the modelling file; or `refused`, with the reason.
    """
    layers = standalone_layers(model)
    if layers is None:
        return "refused: its layers are more than top-k mixtures of feed-forward networks, and need moeify"
    if not vllm_fields(model):
        return AS_WRITTEN
    return FUSED if all(_is_plain(layer["router"]) for layer in layers) else OWN_ROUTER


def vllm_fields(model: nn.Module) -> dict[str, Any]:
    """The fields by which vLLM replaces experts and routers; none where its own would compute something else."""
    layers = standalone_layers(model) or []
    if any(_is_plain(layer["router"] | {"expert_groups": None}) and not _by_best(layer["router"]) for layer in layers):
        return {}  # vLLM would replace the router by one that scores groups by their best expert
    settings = [
        (layer["num_experts"], layer["router"]["k"], layer["experts"]["hidden"], *_groups(layer["router"]))
        for layer in layers
    ]
    if len(set(settings)) != 1 or not all(_is_silu_gated(layer) for layer in moe_layers(model).values()):
        return {}
    (num_experts, k, hidden, *groups), router = settings[0], layers[0]["router"]
    names = dict(zip(("n_group", "topk_group"), groups, strict=False))
    names |= {"norm_topk_prob": router["normalize"], "routed_scaling_factor": router["scale"]}
    return {"num_experts": num_experts, "num_experts_per_tok": k, "moe_intermediate_size": hidden} | names


def _groups(router: dict[str, Any]) -> tuple[int, ...]:
    groups = router["expert_groups"]
    return (groups["count"], groups["keep"]) if groups else ()


def _is_plain(router: dict[str, Any]) -> bool:
    """Whether vLLM's own router computes this one."""
    has_more = router["bias"] or router["selection_bias"] or router["select"] != "score"
    return router["score"] in ("softmax", "sigmoid") and _by_best(router) and not has_more


def _by_best(router: dict[str, Any]) -> bool:
    return router["expert_groups"] is None or router["expert_groups"]["reduce"] == "max"


def _is_silu_gated(layer: Any) -> bool:
    activation = layer.experts.activation
    is_silu = isinstance(activation, Glu) and name_of(activation.act) == "silu"
    return is_silu and layer.experts.down[1] is None
