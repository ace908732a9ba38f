"""`put`: replace the sites of a model by sparse layers, whose contexts read the arguments of its calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from moeify.find.causal import refuse_decoders
from moeify.find.shapes import Site
from moeify.find.sub_tokens import stands_there
from moeify.moe import MoE
from moeify.sparsify.after import append
from moeify.stacks import watch


def put(
    model: nn.Module,
    sites: Sequence[Site],
    layers: Sequence[MoE],
    following: Mapping[str, nn.Module] | None = None,
    *,
    allow_noncausal: bool = False,
) -> Callable[[], None]:
    """Put sparse layers into their sites, and let their contexts read the arguments of the model's calls.

    Args:
        model: the model.
        sites: the places of the sparse layers.
        layers: the sparse layer of each site.
        following: a module for each named layer of a stack, which reads its output before the next layer does.
        allow_noncausal: let decoders have routers that look at later tokens.

    Returns:
        A function that undoes all of it.

    Raises:
        ValueError: a router that looks at later tokens in a decoder; the model is unchanged.
    """
    ahead = {} if allow_noncausal else {s.stack: m.router for s, m in zip(sites, layers, strict=True)}
    ahead = {stack: router for stack, router in ahead.items() if not router.causal}
    undo = []
    for stack, router in ahead.items():
        undo += refuse_decoders(model, [site for site in sites if site.stack == stack], router)
    undo += [site.install(stands_there(site, layer)) for site, layer in zip(sites, layers, strict=True)]
    contexts = {site.stack: layer.context for site, layer in zip(sites, layers, strict=True)}
    undo += [handle.remove for handle in watch(model, [site.name for site in sites], contexts)]
    for name, module in (following or {}).items():
        undo += append(model.get_submodule(name), module)
    return lambda: [restore() for restore in reversed(undo)].clear()
