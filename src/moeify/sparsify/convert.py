"""`sparsify`: dense model in, sparse model out, in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moeify.context import Context
from moeify.find.causal import refuse_causal_calls, says_causal
from moeify.find.dense import DenseFFN
from moeify.find.probe import Probe, as_probe, find_probe
from moeify.find.shapes import Site
from moeify.flops import count
from moeify.modes import fixed_randomness
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers import Router
from moeify.sparsify.after import append
from moeify.sparsify.make import copies, masked, merged
from moeify.sparsify.recipe import Recipe
from moeify.sparsify.report import Report
from moeify.sparsify.shared import nothing


def sparsify(
    model: nn.Module,
    recipe: Recipe,
    *,
    probe: Any = None,
    allow_noncausal: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Put sparse layers where a model has feed-forward networks; returns the same model.

    What is found is checked first: with the readings of its feed-forward networks in their places, the model must
    compute what it computed. A call that raises leaves the model as it was. Under a non-causal router, a model whose
    layers do not say whether they are a decoder's raises as soon as one is called with a causal mask.

    Args:
        model: any module: of transformers, or plain PyTorch.
        recipe: what to make of it.
        probe: an input to compare outputs on (a tensor, a tuple of arguments or a mapping); by default one is guessed.
        allow_noncausal: let decoders have routers that look at later tokens.
        verbose: print a table of what was done.

    Raises:
        ValueError: nothing to make sparse; a module that is not understood; copied experts with weights that do not sum
            to 1; a non-causal router in a decoder; and whatever router, experts, shared and after refuse.
    """
    report = convert(model, recipe, probe=probe, allow_noncausal=allow_noncausal)
    if verbose:
        report.show()
    return model


def convert(model: nn.Module, recipe: Recipe, *, probe: Any = None, allow_noncausal: bool = False) -> Report:
    """`sparsify`, without printing what was done."""
    dense_count = count(model)
    with fixed_randomness(model):
        sites = recipe.where(model)
        compare = Comparison.of(model, find_probe(model) if probe is None else as_probe(probe))
    if compare is not None:
        _verify(model, sites, compare)
    contexts = {site.stack: Context() for site in sites}
    layers = _layers(sites, recipe, contexts)
    followed = _followed(model, sites, recipe)
    _refuse(layers, recipe)

    undo = put(model, sites, layers, allow_noncausal=allow_noncausal)
    for layer, following in followed:
        undo += append(layer, following)
    try:
        difference = None if compare is None else compare.difference(model)
        if compare is not None and _keeps_function(recipe, layers) and not compare.same(model):
            raise ValueError(
                f"copied experts should leave the model's outputs as they are, but one changed by {difference:.3g}; "
                "please report this model"
            )
    except Exception:
        _undo(undo)
        raise
    replace(Origin.of(model), recipe=recipe).write_to(model)
    return Report(sites=sites, layers=layers, before=dense_count, after=count(model), difference=difference)


def put(
    model: nn.Module, sites: list[Site], layers: list[MoE], *, allow_noncausal: bool = False
) -> list[Callable[[], None]]:
    """Put sparse layers into their sites, and let their contexts read what the model is called with.

    Returns:
        What takes all of it back, to be called from the last to the first.

    Raises:
        ValueError: a router that looks at later tokens in a decoder; the model is as it was.
    """
    router = layers[0].router
    if not router.causal and not allow_noncausal:
        for site in sites:
            if says_causal(_layer_of(model, site)):
                raise ValueError(_looks_ahead(site, router))
    undo = [site.install(layer) for site, layer in zip(sites, layers, strict=True)]
    if not router.causal and not allow_noncausal:
        undo += _listen_for_decoders(model, sites, router)
    for stack, context in {site.stack: layer.context for site, layer in zip(sites, layers, strict=True)}.items():
        undo += [handle.remove for handle in context.watch(_above(model, stack))]
    return undo


def _layers(sites: list[Site], recipe: Recipe, contexts: dict[str, Context]) -> list[MoE]:
    latest: dict[str, MoE] = {}
    layers = []
    for site in sites:
        latest[site.stack] = _layer(site, recipe, contexts[site.stack], latest.get(site.stack))
        layers.append(latest[site.stack])
    return layers


def _layer(site: Site, recipe: Recipe, context: Context, previous: MoE | None) -> MoE:
    like = next(site.dense.parameters())
    with torch.device(like.device):
        router = recipe.router(site.width, recipe.num_experts)
        router = (router if previous is None else router.follow(previous.router)).to(like.dtype)
        experts = recipe.experts(site.dense, recipe.num_experts)
        shared = recipe.shared(site.dense, site.width)
    layer = MoE(router, experts, shared, context=context, name=site.name)
    return layer.train(site.training)


def _followed(model: nn.Module, sites: list[Site], recipe: Recipe) -> list[tuple[nn.Module, nn.Module]]:
    """The layers in which sparse ones stand, and what follows each."""
    found = []
    for site in {site.layer: site for site in sites}.values():
        following = recipe.after(site.dense, site.width)
        if following is not None and not site.layer:
            raise ValueError(
                f"{site.name} stands in no numbered layer, so that nothing can follow it; use after=nothing"
            )
        if following is not None:
            found.append((model.get_submodule(site.layer), following.train(site.training)))
    return found


def _refuse(layers: list[MoE], recipe: Recipe) -> None:
    router = layers[0].router
    if _is_copy(recipe) and not router.weights_sum_to_one and recipe.num_experts > 1:
        raise ValueError(
            f"copied experts under {type(router).__name__} weights that do not sum to 1 destroy the dense model's "
            "function at the first step; let the router normalise its weights (TopK(normalize=True)), give a "
            "compensating scale (partial(copies, scale=...)), or train new experts (experts=fresh)"
        )
    if _is_copy(recipe) and layers[0].shared is not None:
        raise ValueError(
            "copied experts beside a shared copy of the same network count it twice; use experts=fresh (with zero=True "
            "the model starts as it was), or shared=nothing"
        )


def _listen_for_decoders(model: nn.Module, sites: list[Site], router: Router) -> list[Callable[[], None]]:
    """Raise in the first call that shows one of the stacks to be a decoder; the comparison is such a call."""
    first = {site.stack: site for site in reversed(sites)}
    return [
        handle.remove
        for site in first.values()
        for handle in refuse_causal_calls(_layer_of(model, site), _looks_ahead(site, router))
    ]


def _layer_of(model: nn.Module, site: Site) -> nn.Module:
    return model.get_submodule(site.layer) if site.layer else model


def _looks_ahead(site: Site, router: Router) -> str:
    return (
        f"{site.name} is in a decoder, and {type(router).__name__} decides by looking at later tokens: training would "
        "leak the future and generation would differ; choose a causal router, or pass allow_noncausal=True"
    )


def _options(maker: Callable) -> tuple[Callable, dict[str, Any]]:
    made, options = (maker.func, maker.keywords) if isinstance(maker, partial) else (maker, {})
    return _options(options["experts"]) if made is masked and "experts" in options else (made, options)


def _is_copy(recipe: Recipe) -> bool:
    maker, options = _options(recipe.experts)
    return maker in (copies, merged) and options.get("scale", 1.0) == 1.0


def _keeps_function(recipe: Recipe, layers: list[MoE]) -> bool:
    _, options = _options(recipe.experts)
    same = not options.get("noise") and not options.get("drop") and recipe.after is nothing
    return same and _is_copy(recipe) and layers[0].router.weights_sum_to_one


@dataclass(frozen=True)
class Comparison:
    """A model's output on a probe before any change, to compare later outputs with."""

    probe: Probe
    before: Tensor

    @classmethod
    def of(cls, model: nn.Module, probe: Probe | None) -> Comparison | None:
        """Run a model as it is, if there is a probe."""
        return None if probe is None else cls(probe, probe.run(model))

    def difference(self, model: nn.Module) -> float:
        """The largest change of an output."""
        return (self.before - self.probe.run(model)).abs().max().item()

    def same(self, model: nn.Module) -> bool:
        """Whether the model still computes what it did, but for rounding."""
        rounding = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
        return self.difference(model) <= rounding * self.before.abs().max().item()


def _verify(model: nn.Module, sites: list[Site], compare: Comparison) -> None:
    """Replace every FFN by our reading of it: the model must not change.

    Raises:
        ValueError: it does; the message names the first site that changes it.
    """
    readings = [site for site in sites if isinstance(site.dense, DenseFFN)]
    if _same_with(model, readings, compare):
        return
    culprit = next((site for site in readings if not _same_with(model, [site], compare)), readings[0])
    raise ValueError(
        f"{culprit.name} was taken for a feed-forward network, but the model computes something else there than "
        "down(act(up(x))); leave it out with where=named(...), or make whole copies of a module with where=modules(...)"
    )


def _same_with(model: nn.Module, sites: list[Site], compare: Comparison) -> bool:
    undo = [site.install(site.dense) for site in sites]
    try:
        return compare.same(model)
    except Exception:  # whatever the model raises where it is misread
        return False
    finally:
        _undo(undo)


def _undo(actions: list[Callable[[], None]]) -> None:
    for restore in reversed(actions):
        restore()


def _above(model: nn.Module, stack: str) -> list[nn.Module]:
    """The modules from the model down to what holds a stack of layers."""
    parts = stack.split(".") if stack else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]
