"""Sites (places for sparse layers) as plain values, modules by name, so that a saved model is built without a search.

    {"name": "model.layers.0.mlp", "width": 32,
     "up": ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"], "down": "model.layers.0.mlp.down_proj",
     "gated": true, "activation": {"name": "silu"}, "dropout": 0.0}

Instead of projections, a site may be read as a chain of modules (`parts`), or as the module itself. `after`,
`disabled`, `sequence_first`, `routes_padding`, `keyword` and `heads` are omitted where they have their defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moeify.find.dense import DenseFFN
from moeify.find.shapes import Site, disable, pass_through
from moeify.find.sub_tokens import cut
from moeify.kernels.stacked import Elementwise, Glu, Plain, gelu_tanh

_NAMED: dict[str, Elementwise] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}  # fmt: skip


def describe(model: nn.Module, site: Site) -> dict[str, Any]:
    """Describe a site of a model that is still dense, as plain values."""
    names = {id(module): name for name, module in model.named_modules()}
    values: dict[str, Any] = {"name": site.name, "width": site.width}
    dense = site.dense
    if isinstance(dense, DenseFFN):
        values |= {
            "up": [names[id(up)] for up in dense.ups],
            "down": names[id(dense.down)],
            "gated": isinstance(dense.activation, Glu),
            "activation": _activation(model, dense.activation.act),
            "dropout": dense.dropout.p,
        }
    elif names.get(id(dense)) != site.name:
        values["parts"] = [names[id(part)] for part in dense.children()]
    if site.after:
        values["after"] = site.after
    if site.disabled:
        values["disabled"] = [[names[id(owner)], attribute, _plain(value)] for owner, attribute, value in site.disabled]
    for fact in ("sequence_first", "routes_padding", "keyword"):
        if getattr(site, fact):
            values[fact] = getattr(site, fact)
    if site.heads > 1:
        values["heads"] = site.heads
    return values


def rebuild(model: nn.Module, values: dict[str, Any]) -> Site:
    """The site that was described, in a model of the same modules; nothing is run.

    Raises:
        ValueError: the model has no such modules, or the description is damaged.
    """
    try:
        return _rebuilt(model, values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        name = values.get("name") if isinstance(values, dict) else None
        raise ValueError(
            f"this {type(model).__name__} has no modules for the site {name!r} of the saved model ({error}); "
            "the description is damaged, or the model is another"
        ) from None


def _rebuilt(model: nn.Module, values: dict[str, Any]) -> Site:
    name = values["name"]
    parent, _, child = name.rpartition(".")
    dense = model.get_submodule(name)
    if "up" in values:
        act = _activation_of(model, values["activation"])
        activation = Glu(act) if values["gated"] else Plain(act)
        ups = [model.get_submodule(up) for up in values["up"]]
        dense = DenseFFN(ups, model.get_submodule(values["down"]), activation, values["dropout"])
    elif "parts" in values:
        dense = nn.Sequential(*[model.get_submodule(part) for part in values["parts"]])
    disabled = []
    for owner, attribute, value in values.get("disabled", ()):
        module = model.get_submodule(owner)
        _own(module, attribute)
        disabled.append(disable(module, attribute) if value is None else (module, attribute, value))
    place = (model.get_submodule(parent), child)
    facts = {fact: values[fact] for fact in ("sequence_first", "routes_padding", "keyword") if fact in values}
    site = Site(name, dense, place, values.get("after", 0.0), tuple(disabled), values["width"], **facts)
    return cut(site, values["heads"]) if "heads" in values else site


def _plain(value: Any) -> Any:
    return None if value is pass_through or isinstance(value, nn.Identity) else value


def _activation(model: nn.Module, act: Elementwise) -> dict[str, str]:
    """An activation by its name, or by the module and attribute that hold it."""
    for name, known in _NAMED.items():
        if known is act:
            return {"name": name}
    for owner, attribute in _held(model, act):
        return {"module": owner, "attribute": attribute}
    raise KeyError(f"no module holds the activation {act}")


def _held(model: nn.Module, act: Elementwise) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        for attribute, part in [*module._modules.items(), *vars(module).items()]:
            if part is act:
                yield name, attribute


def _activation_of(model: nn.Module, values: dict[str, str]) -> Elementwise:
    if "name" in values:
        return _NAMED[values["name"]]
    act = _own(model.get_submodule(values["module"]), values["attribute"])
    if not callable(act):
        raise ValueError(f"{values['module']}.{values['attribute']} is not an activation")
    return act


def _own(module: nn.Module, attribute: str) -> Any:
    """An attribute in the module's own state, so that a file cannot name a method."""
    return module._modules[attribute] if attribute in module._modules else vars(module)[attribute]
