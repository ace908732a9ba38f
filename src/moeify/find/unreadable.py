"""Explain why linear layers cannot be read as dense weights: they have PEFT adapters, or quantised weights."""

from __future__ import annotations

from torch import nn

from moeify.find.dense import is_quantized
from moeify.find.shapes import Site


def why_unreadable(model: nn.Module, sites: list[Site]) -> str | None:
    """The reason why feed-forward networks of a dense model cannot be read, and the way out; None if there is none.

    Looks inside the sites that were found, and into the numbered layers (everywhere, if no site was found) without one.
    """
    served = {site.layer for site in sites}
    inside = [(f"{site.name}.{name}", part) for site in sites for name, part in site.dense.named_modules()]
    outside = [
        (name, part)
        for name, part in model.named_modules()
        if not sites or ((layer := Site(name, part, (model, name)).layer) and layer not in served)
    ]
    for name, module in inside + outside:
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            return (
                f"PEFT adapters are on {name}, so that no feed-forward network can be read there; merge them into the "
                "base first (model = model.merge_and_unload()), or make the base sparse without them"
            )
        if is_quantized(module):
            return quantized_base(name, module)
    return None


def quantized_base(name: str, module: nn.Module) -> str:
    """The message for a quantised layer where weights are needed."""
    return (
        f"the base is quantised: {name} is a {type(module).__name__} with a weight of {module.weight.dtype}, "
        "from which no expert can be made; load the base in 16 or 32 bits, or put adapters beside it, which need only "
        "its widths: from_adapters, or where=linears(...), experts=lora, shared=frozen"
    )
