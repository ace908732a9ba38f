"""Where to put sparse layers: functions from a model to the sites in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from moeify.find.dense import accepts, is_linear, is_quantized, widths
from moeify.find.once import recognised
from moeify.find.shapes import Site, fast_paths, whole
from moeify.find.unreadable import why_unreadable
from moeify.layers import moe_layers, sparse_layers
from moeify.patterns import search
from moeify.registry import register

Where = Callable[[nn.Module], list[Site]]


@register("where", "ffn")
def ffn(model: nn.Module) -> list[Site]:
    """Every feed-forward network in the numbered layers of a model; if it has no such layers, all of them.

    In a layer, a feed-forward network has outputs as wide as its inputs; existing experts are excluded.

    Raises:
        ValueError: there is none; the model is sparse already; or a layer has no feed-forward network but a module with
            the parts of one, that computes something else.
    """
    sites, rejected = candidates(model)
    served = {site.layer for site in sites}
    _refuse(model, [name for name in rejected if whole(model, name).layer not in served])
    if not sites:
        raise ValueError(
            f"no feed-forward network was found in this {type(model).__name__}; name the modules to make sparse, "
            "where=modules(r'regular expression'), after a look at print(*dict(model.named_modules()), sep='\\n')"
        )
    return sites


def candidates(model: nn.Module) -> tuple[list[Site], list[str]]:
    """The feed-forward networks that can become sparse, and the modules with the parts of one that cannot be read.

    Raises:
        ValueError: the model is sparse already, or its linear layers hold no plain weights.
    """
    if moe_layers(model):
        raise ValueError(f"this {type(model).__name__} is sparse already; start from the dense model")
    found, rejected = recognised(model)
    sparse = list(sparse_layers(model))
    sites = [site for site in found if not is_expert(site, sparse)]
    sites = [site for site in sites if why_left(model, site, sites) is None] or sites
    if not sparse and (reason := why_unreadable(model, sites)) is not None:
        raise ValueError(f"this {type(model).__name__} cannot be made sparse: {reason}")
    if not sites and (already := sparse + [site.name for site in found]):
        raise ValueError(
            f"this {type(model).__name__} is sparse already (see {already[0]}); start from the dense model"
        )
    return sites, rejected


def why_left(model: nn.Module, site: Site, sites: list[Site]) -> str | None:
    """Why a feed-forward network stays dense if the model has better sites; None if it may become sparse."""
    if not site.layer:
        return "it is in no numbered layer"
    if not site.keeps_width:
        return "its outputs are not as wide as its inputs"
    norms = _norm_widths(model.get_submodule(site.layer))
    fits = any(other.layer == site.layer and other.width in norms for other in sites)
    return f"its width, {site.width}, is not that of the layer's tokens" if fits and site.width not in norms else None


def _norm_widths(layer: nn.Module) -> set[int]:
    """The widths of the norms of a layer, that of its tokens among them."""
    weights = (part._parameters.get("weight") for part in layer.modules() if "Norm" in type(part).__name__)
    return {len(weight) for weight in weights if weight is not None and weight.dim() == 1}


def is_expert(site: Site, layers: list[str]) -> bool:
    """Whether a network is an expert, by its name or by being inside one of the sparse layers."""
    return "expert" in site.name.lower() or any(f"{site.name}.".startswith(f"{layer}.") for layer in layers)


def _refuse(model: nn.Module, rejected: list[str]) -> None:
    for name in rejected:
        module = model.get_submodule(name)
        rows = any(accepts(module, widths(part)[1]) for part in module.modules() if is_linear(part))
        copies = f", or make its experts whole copies of it with where=modules(r'{re.escape(name)}$')" if rows else ""
        raise ValueError(
            f"{name} ({type(module).__name__}) has the linear maps of a feed-forward network, but does not compute "
            f"down(act(up(x))) or down(act(gate(x)) · up(x)); leave it out with where=named(...){copies}"
        )


def every(n: int) -> Where:
    """Every n-th feed-forward network of each stack: the n-th, the 2n-th, ...; of a stack of fewer, the last."""
    return partial(_every, n=n)


@register("where", "every")
def _every(model: nn.Module, n: int) -> list[Site]:
    _at_least_one("every", n)
    return [site for sites in _by_stack(ffn(model)) for site in sites[n - 1 :: n] or sites[-1:]]


@register("where", "odd")
def odd(model: nn.Module) -> list[Site]:
    """The second, fourth, ... feed-forward network of each stack, whose layer numbers are odd (GShard, Switch)."""
    return _every(model, n=2)


def last(n: int, *, where: Where = ffn) -> Where:
    """The last n feed-forward networks of each stack, or of those in a stack that `where` chose.

    V-MoE's "last 2" are the last two of every second one, `last(2, where=odd)`: blocks 5 and 7 of 0 to 7.
    """
    return partial(_last, n=n, where=where)


@register("where", "last")
def _last(model: nn.Module, n: int, *, where: Where = ffn) -> list[Site]:
    _at_least_one("last", n)
    return [site for sites in _by_stack(where(model)) for site in sites[-n:]]


@register("where", "last_half")
def last_half(model: nn.Module) -> list[Site]:
    """The last half of the feed-forward networks of each stack, the middle one included (Soft MoE)."""
    return [site for sites in _by_stack(ffn(model)) for site in sites[len(sites) // 2 :]]


def named(regex: str) -> Where:
    """The feed-forward networks whose name matches."""
    return partial(_named, regex=regex)


@register("where", "named")
def _named(model: nn.Module, regex: str) -> list[Site]:
    sites, rejected = candidates(model)
    _refuse(model, [name for name in rejected if re.search(regex, name)])
    return _some([site for site in sites if re.search(regex, site.name)], regex, [site.name for site in sites])


def chosen(predicate: Callable[[str, nn.Module], bool]) -> Where:
    """The feed-forward networks for which `predicate(name, dense module)` holds."""
    return lambda model: [site for site in candidates(model)[0] if predicate(site.name, site.dense)]


def modules(regex: str) -> Where:
    """Any modules with linear layers whose name matches; their experts are whole copies."""
    return partial(_modules, regex=regex)


@register("where", "modules")
def _modules(model: nn.Module, regex: str) -> list[Site]:
    every_name = [name for name, part in model.named_modules() if name and any(map(_has_widths, part.modules()))]
    found = [name for name in every_name if search(regex, name)]
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return _some([whole(model, name) for name in outermost], regex, every_name)


def linears(regex: str = "") -> Where:
    """The linear layers whose name matches, in the numbered layers of a model; for low-rank experts beside each."""
    return partial(_linears, regex=regex)


@register("where", "linears")
def _linears(model: nn.Module, regex: str = "") -> list[Site]:
    """Layers whose weights a module reads without calling them are excluded: their experts would not run."""
    uncalled = [name for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)]
    names = [
        name for name, part in model.named_modules() if _has_widths(part) and name.rpartition(".")[0] not in uncalled
    ]
    sites = [whole(model, name) for name in names]
    sites = [site for site in sites if site.layer] or sites
    sites = [replace(site, disabled=tuple(fast_paths(model, site.place[0]))) for site in sites]
    return _some([site for site in sites if search(regex, site.name)], regex, [site.name for site in sites])


def _has_widths(module: nn.Module) -> bool:
    return is_linear(module) or is_quantized(module)


def _some(sites: list[Site], regex: str, names: list[str]) -> list[Site]:
    if not sites:
        raise ValueError(f"nothing matches {regex!r}; there are: {', '.join(names[:8])}{', ...' * (len(names) > 8)}")
    return sites


def _at_least_one(name: str, n: int) -> None:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"where={name}({n!r}): n must be a whole number from 1 on")


def _by_stack(sites: list[Site]) -> list[list[Site]]:
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(site.stack, []).append(site)
    return list(stacks.values())
