"""Read a model as a `ModelSpec`: a class of `families` that `sparsify` made sparse, or an MoE class of `families`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.export.experts import GatedFFNs, gated_ffns, shared_of
from moeify.export.families import DENSE, EXPERTS, SPARSE, Family
from moeify.export.model_spec import ModelSpec, Unsupported
from moeify.export.routers import token_choice_of
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.store.config import architecture_of
from moeify.store.peft import has_adapters


def spec_of(model: nn.Module) -> ModelSpec:
    """Describe a causal language model of transformers with sparse layers as a `ModelSpec`.

    Raises:
        Unsupported: a class that is not in the table, or sparse layers that the tables cannot express.
    """
    if has_adapters(model):
        raise Unsupported("it has adapters of PEFT; merge them first: model = model.merge_and_unload()")
    layers = moe_layers(model)
    family = _family(model, DENSE if layers else SPARSE)
    return _read_sparsified(model, family, layers) if layers else _read_hf(model, family)


def _family(model: Any, table: Any) -> Family:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as heads

    architecture: Any = architecture_of(model)  # of what AutoModel opened, too
    model_type = getattr(getattr(architecture, "config_class", None), "model_type", "")
    if model_type not in table or getattr(architecture, "__name__", "") != heads.get(model_type):
        known = ", ".join(f"{family.title}" for family in table.values())
        kind = (
            "no sparse layers of moeify, and is not an MoE" if table is SPARSE else "sparse layers of moeify, but is no"
        )
        raise Unsupported(f"{type(model).__name__} has {kind} causal language model that can be exported: {known}")
    return table[model_type]


def _base(model: Any, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Traits from the configuration, and all tensors; embeddings are tied if they are one tensor."""
    traits = {trait: rule.read(model.config) for trait, rule in family.rules.items()}
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    traits["tied"] = tensors["lm_head.weight"] is tensors["model.embed_tokens.weight"]
    if traits["tied"]:
        del tensors["lm_head.weight"]
    return traits, {name: tensor.detach() for name, tensor in tensors.items()}


def _read_hf(model: Any, family: Family) -> ModelSpec:
    traits, tensors = _base(model, family)
    for i in traits["sparse_layers"]:
        for part, names in family.names.items():
            stored = [f"model.layers.{i}.{name}" for name in ([names] if isinstance(names, str) else names)]
            if stored[0] in tensors:
                found = torch.cat([tensors.pop(name) for name in stored]) if len(stored) > 1 else tensors.pop(stored[0])
                tensors[f"layers.{i}.{part}"] = found.flatten() if part == "selection_bias" else found
    return ModelSpec(_with_effect(traits), tensors)


def _read_sparsified(model: Any, family: Family, layers: dict[str, MoE]) -> ModelSpec:
    traits, tensors = _base(model, family)
    traits["sparse_layers"] = tuple(sorted(_layer_index(name) for name in layers))
    rewrites: dict[str, None] = {}
    of_layers: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        for inner in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[inner]
        of_layers[name], parts, merged = _sparse_layer(layer, model.config.hidden_act)
        tensors |= {f"layers.{_layer_index(name)}.{part}": tensor.detach() for part, tensor in parts.items()}
        rewrites |= dict.fromkeys(merged)
    traits = dict.fromkeys(EXPERTS) | traits | _common(of_layers)
    unknown = [name for name in tensors if re.fullmatch(r"model\.layers\.\d+\.after\..*", name)]
    if unknown:
        raise Unsupported("dense networks follow its sparse layers (after=sandwich), which no other program supports")
    return ModelSpec(_with_effect(traits), tensors, tuple(rewrites))


def _with_effect(traits: dict[str, Any]) -> dict[str, Any]:
    """All traits but those of dense networks, if there are none."""
    all_sparse = len(traits["sparse_layers"]) == traits["layers"]
    idle = {"ffn_hidden", *(["ffn_bias"] if traits["shared"] is None else [])} if all_sparse else ()
    return {trait: value for trait, value in traits.items() if trait not in idle}


def _layer_index(name: str) -> int:
    found = re.fullmatch(r"model\.layers\.(\d+)\.mlp", name)
    if name.endswith(".mlp.moe"):
        raise Unsupported("its sparse layers route sub-tokens (MH-MoE), which no other program supports")
    if found is None:
        raise Unsupported(
            f"its sparse layer {name} replaces a single linear layer, and experts of other programs are whole "
            "feed-forward networks (mlp); moeify.compose.merge_into_base(model, weights) makes one dense model of "
            "adapters beside linear layers"
        )
    return int(found[1])


def _sparse_layer(layer: MoE, hidden_act: str) -> tuple[dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    if layer.memory is not None:
        raise Unsupported("it has a memory of n-grams (memory), which no other program supports")
    choice, shared = token_choice_of(layer.router), shared_of(layer.shared)
    if not isinstance(layer.experts, Experts):
        raise Unsupported(f"its experts are wrapped in a {type(layer.experts).__name__}; export them without it")
    experts = gated_ffns(layer.experts)
    traits = choice.traits | {"num_experts": len(experts.down), "expert_hidden": experts.hidden}
    parts = {"router": choice.router, "gate_up": experts.gate_up, "down": experts.down}
    if choice.bias is not None:
        parts["selection_bias"] = choice.bias
    for ffns in [experts, *([shared[1]] if shared else [])]:
        _require_activation(ffns, hidden_act)
    traits["shared"] = None if shared is None else (shared[0], shared[1].hidden)
    if shared is not None:
        parts |= {"shared_gate_up": shared[1].gate_up[0], "shared_down": shared[1].down[0]}
        if shared[2] is not None:
            parts["shared_gate"] = shared[2]
    return traits, parts, experts.rewrites


def _require_activation(ffns: GatedFFNs, hidden_act: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 97)
    if not torch.equal(ACT2FN[hidden_act](x), ffns.activation.act(x)):
        raise Unsupported(f"the activation of its experts is not that of the dense model, {hidden_act}")


def _common(of_layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The traits of all sparse layers, which must be the same."""
    (first, traits), *others = of_layers.items()
    for name, other in others:
        for trait, value in other.items():
            if value != traits[trait]:
                raise Unsupported(
                    f"{trait} is {traits[trait]} in {first} and {value} in {name}; in other programs it is the same in "
                    "all layers"
                )
    return traits
