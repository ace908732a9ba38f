"""Quantise the experts and linear layers of a model to int8 or int4, and describe the quantisation for saving."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from moeify.compress.quantized_layers import QuantizedExperts, QuantizedLinear
from moeify.experts import Experts, Quantized, quantize
from moeify.experts.quantized import Weights
from moeify.given import model_given
from moeify.hf.interface import HfExperts
from moeify.layers import moe_layers
from moeify.progress import with_progress

Model = TypeVar("Model", bound=nn.Module)


def quantize_experts(model: Model, bits: int = 8, group_size: int = 64) -> Model:
    """Quantise the weights of all feed-forward experts of a model to int8 or int4; in place, layer by layer.

    `moeify.store.save` writes the quantised weights, and `load` restores them exactly.

    Args:
        model: a model with `moeify.MoE` layers.
        bits: 8 or 4.
        group_size: weights that share a scale, 32 or 64; used for 4 bits only.

    Raises:
        ValueError: the model has no experts that can be quantised.
    """
    found = [
        name
        for name, part in model_given(model).named_modules()
        if isinstance(part, Experts) and part.stacked is not None
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward experts to quantise; make it sparse first")
    for name in with_progress(found, "quantising experts"):
        quantize_module(model, name, bits, group_size)
    return model


def quantize_decoder(model: Any, bits: int) -> None:
    """Quantise the experts and projections of a Llama-like decoder, and its head to 8 bits; in place.

    Routers, norms and embeddings are not quantised.

    Args:
        model: a model with layers in `model.layers`, and an `lm_head`.
        bits: 8 or 4.

    Raises:
        ValueError: experts that cannot be quantised.
    """
    ours = [f"{name}.experts" for name, moe in moe_layers(model).items() if not isinstance(moe.experts, Quantized)]
    theirs = [name for name, module in model.named_modules() if hasattr(module, "_apply_gate")]
    for name in with_progress([*ours, *theirs], "quantising experts"):
        quantize_module(model, name, bits)
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is nn.Linear and name.rsplit(".", 1)[-1] in _PROJECTIONS:
            quantize_module(model, f"model.layers.{name}", bits)
    if type(model.lm_head) is nn.Linear:
        quantize_module(model, "lm_head", 8)


_PROJECTIONS = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


def quantize_module(model: nn.Module, name: str, bits: int, group_size: int = 64) -> None:
    """Replace a linear layer, or experts of moeify or transformers, by a quantised module; in place.

    Args:
        model: the model.
        name: the name of the module in it.
        bits: 8 or 4.
        group_size: weights that share a scale, 32 or 64; used for 4 bits only.

    Raises:
        ValueError: a module of another type, or other bits or group sizes.
    """
    if bits not in (8, 4) or group_size not in (32, 64):
        raise ValueError(
            f"weights of {bits} bits in groups of {group_size} are not supported; choose 8 or 4 bits, 32 or 64"
        )
    module = model.get_submodule(name)
    if isinstance(module, Experts) or hasattr(module, "_apply_gate"):
        experts = quantize(module if isinstance(module, Experts) else HfExperts(module), bits, group_size)
        quantized = experts if isinstance(module, Experts) else QuantizedExperts(experts)
    elif type(module) is nn.Linear:
        quantized = QuantizedLinear(module, bits, group_size)
    else:
        raise ValueError(f"{name} is a {type(module).__name__}, and only linear layers and experts can be quantised")
    model.set_submodule(name, quantized)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = _refuse_save_pretrained


def _refuse_save_pretrained(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "from_pretrained would not know the quantised weights and start from random ones; write them by "
        "moeify.store.save(model, folder) and read them by moeify.store.load(folder)"
    )


def quantization_of(model: nn.Module) -> list[dict[str, Any]]:
    """The name, bits and group size of each quantised module of a model, as JSON values for `quantize_as`."""
    found: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{each['module']}.") for each in found)
        if isinstance(module, QuantizedLinear | QuantizedExperts | Quantized) and not inside:
            weights = next(part for part in module.modules() if isinstance(part, Weights))
            found.append({"module": name, "bits": weights.bits, "group_size": weights.group_size})
    return found


def quantize_as(model: nn.Module, quantization: Iterable[Mapping[str, Any]]) -> None:
    """Quantise the modules listed by `quantization_of`, with the same settings; in place.

    Raises:
        ValueError: a module that the model does not have, or an error of `quantize_module`.
    """
    modules = dict(model.named_modules())
    for each in quantization:
        if not isinstance(each, Mapping) or str(each.get("module")) not in modules:
            raise ValueError(f"there is no module to quantise for {each!r}; the config is damaged or of another model")
        quantize_module(model, each["module"], each.get("bits", 8), each.get("group_size", 64))
