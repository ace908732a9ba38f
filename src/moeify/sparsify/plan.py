"""`Plan`: the sites that a recipe finds in a model and their sparse layers, verified and then put in place.

plan = find(model, recipe)
plan.verify(probe)
undo = plan.apply()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from moeify.context import Context
from moeify.find.causal import in_decoder
from moeify.find.contexts import contexts_of
from moeify.find.dense import compute_dtype, is_quantized
from moeify.find.describe import describe, rebuild
from moeify.find.shapes import Site
from moeify.find.sub_tokens import read_there
from moeify.find.unreadable import quantized_base
from moeify.given import named
from moeify.meta import made_on
from moeify.modes import fixed_randomness
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.progress import with_progress
from moeify.snapshot import restored_on_error
from moeify.sparsify.comparison import Comparison
from moeify.sparsify.lora import lora
from moeify.sparsify.make import copies, masked, merged, splits, with_multiplicative_bias
from moeify.sparsify.put import put
from moeify.sparsify.recipe import Recipe, recipe_given
from moeify.sparsify.residual import beside, refuse_misfit, residual_splits
from moeify.sparsify.shared import frozen, nothing
from moeify.sparsify.verified import verified
from moeify.sparsify.whole import of_sequences, whole_modules


@dataclass(frozen=True)
class Plan:
    """The sites and sparse layers of a recipe in a model, which stays unchanged until `apply`.

    Attributes:
        model: the dense model.
        recipe: how to make it sparse.
        sites: the dense modules to replace.
    """

    model: nn.Module
    recipe: Recipe
    sites: list[Site]

    @cached_property
    def layers(self) -> list[MoE]:
        """The sparse layer of each site, made at first access.

        Raises:
            ValueError: invalid settings of router, experts or shared; experts that destroy the dense model's function.
        """
        refuse_misfit(self.recipe.experts, self.recipe.shared)
        layers = _layers(self.model, self.sites, self.recipe, contexts_of(self.sites))
        _refuse(self.sites, layers, self.recipe)
        return layers

    @cached_property
    def following(self) -> dict[str, nn.Module]:
        """The modules that run after the numbered layers that contain sparse ones, by name, made at first access.

        Raises:
            ValueError: something would follow a site outside the numbered layers, or as of `after`.
        """
        made = {}
        for site in {site.layer: site for site in self.sites}.values():
            following = self.recipe.after(site.dense, site.width)
            if following is not None and not site.layer:
                raise ValueError(
                    f"{site.name} stands in no numbered layer, so that nothing can follow it; use after=nothing"
                )
            if following is not None:
                made[site.layer] = following.train(site.training)
        return made

    @property
    def keeps_function(self) -> bool:
        """Whether the sparse model computes what the dense model does, but for rounding."""
        _, options = _options(self.recipe.experts)
        same = not options.get("noise") and not options.get("drop") and self.recipe.after is nothing
        return same and _is_copy(self.recipe) and self.layers[0].router.weights_sum_to_one

    def verify(self, probe: Any = None) -> Comparison:
        """Replace every feed-forward network by its `DenseFFN` for a moment: the model must not change.

        The run also shows how sites are called, how they lay out tokens, and in which stacks padding must be routed.

        Args:
            probe: an input (a tensor, a tuple of arguments or a mapping); by default one is guessed.

        Returns:
            The dense model's outputs, to compare the sparse model's with.

        Raises:
            ValueError: the model changes; the message names the first site that changes it. Or nothing can be shown:
                no input could be guessed, or the input does not reach a site. Or a site is given more than tokens.
        """
        return restored_on_error(self.model, lambda: self._verify(probe))

    def _verify(self, probe: Any) -> Comparison:
        compare, self.sites[:] = verified(self.model, self.sites, probe, whole=_is_whole(self.recipe))
        return compare

    def apply(self, *, allow_noncausal: bool = False) -> Callable[[], None]:
        """Put the sparse layers in place, and record the origin of the model.

        Args:
            allow_noncausal: let decoders have routers that look at later tokens.

        Returns:
            A function that undoes all of it.

        Raises:
            ValueError: as of `layers` and `following`; a router that looks at later tokens in a decoder. The
                model is unchanged.
        """
        return restored_on_error(self.model, lambda: self._apply(allow_noncausal), values=False)

    def _apply(self, allow_noncausal: bool) -> Callable[[], None]:
        before = Origin.of(self.model)
        described = self.describe()
        undo = put(self.model, self.sites, self.layers, self.following, allow_noncausal=allow_noncausal)
        replace(before, recipe=self.recipe, sites=described).write_to(self.model)

        def restore() -> None:
            undo()
            before.write_to(self.model)

        return restore

    def describe(self) -> list[dict[str, Any]] | None:
        """The sites as plain values, for `find`; None if a site is not made of the model's own modules."""
        try:
            return [describe(self.model, site) for site in self.sites]
        except KeyError:
            return None


def find(model: nn.Module, recipe: Recipe, described: list[dict[str, Any]] | None = None) -> Plan:
    """Where a recipe puts sparse layers into a model; nothing is changed.

    Args:
        model: the dense model.
        recipe: what to make of it.
        described: the sites of a model of the same modules (`Plan.describe`); with them nothing is searched or run.

    Raises:
        ValueError: nothing to make sparse; a module that is not understood; a description of another model.
    """
    recipe = recipe_given(recipe)
    if described is not None:
        return Plan(model, recipe, [rebuild(model, site) for site in described])

    def found() -> Plan:
        with fixed_randomness(model):
            sites = _sites(model, recipe)
            sites = [of_sequences(site) for site in sites] if _is_whole(recipe) else sites
        for site in sites:
            _refuse_quantized(site, recipe)
        return Plan(model, recipe, sites)

    return restored_on_error(model, found, values=False)


def _sites(model: nn.Module, recipe: Recipe) -> list[Site]:
    sites = recipe.where(model)
    if not isinstance(sites, list) or not all(isinstance(site, Site) for site in sites):
        raise TypeError(
            f"where of a recipe returns a list of sites, as ffn does, and not {named(sites)}; chosen(...) makes one "
            "of a function of name and module that returns True or False"
        )
    if not sites:
        raise ValueError(f"where=... found nothing to make sparse in this {type(model).__name__}")
    return sites


def _layers(model: nn.Module, sites: list[Site], recipe: Recipe, contexts: dict[str, Context]) -> list[MoE]:
    latest: dict[str, MoE] = {}
    layers = []
    for site in with_progress(sites, "making experts"):
        of_decoder = recipe.decoder_router if in_decoder(model, site) else None
        here = recipe if of_decoder is None else replace(recipe, router=of_decoder)
        dtype = compute_dtype(model, site.dense)
        latest[site.stack] = _layer(site, here, contexts[site.stack], latest.get(site.stack), dtype)
        layers.append(latest[site.stack])
    return layers


def _layer(site: Site, recipe: Recipe, context: Context, previous: MoE | None, dtype: torch.dtype) -> MoE:
    like = next(site.dense.parameters())
    dense, width = read_there(site)
    with made_on(like.device):
        router = recipe.router(width, recipe.num_experts)
        router = (router if previous is None else router.link_to(previous.router)).to(dtype)
    with torch.device(like.device):
        experts = recipe.experts(dense, recipe.num_experts).to(dtype)
        shared = beside(recipe.shared, recipe.num_experts)(dense, width)
        memory = recipe.memory(dense, width)
    layer = MoE(router, experts, shared, memory=memory, context=context, name=site.name)
    return layer.train(site.training)


def _refuse_quantized(site: Site, recipe: Recipe) -> None:
    """Refuse experts other than adapters for a quantised layer, and shared modules other than the layer itself."""
    if recipe.shared is frozen and _options(recipe.experts)[0] is lora:
        return
    for name, part in site.dense.named_modules():
        if is_quantized(part):
            raise ValueError(quantized_base(f"{site.name}.{name}".rstrip("."), part))


def _refuse(sites: list[Site], layers: list[MoE], recipe: Recipe) -> None:
    router = layers[0].router
    if (maker := _options(recipe.experts)[0]) in (copies, merged, splits, residual_splits) and any(
        site.heads > 1 for site in sites
    ):
        raise ValueError(
            f"experts={maker.__name__} keeps what a network computes of whole tokens, and experts on sub-tokens read "
            "parts of one; train new experts (experts=fresh)"
        )
    if _is_copy(recipe) and not router.weights_sum_to_one and recipe.num_experts > 1:
        raise ValueError(
            f"copied experts under {type(router).__name__} weights that do not sum to 1 destroy the dense model's "
            "function at the first step; let the router normalise its weights (TopK(normalize=True)), give a "
            "compensating scale (partial(copies, scale=...)), or train new experts (experts=fresh)"
        )
    if _is_whole(recipe) and layers[0].shared is not None:
        raise ValueError(
            "a shared module would not get the further arguments of whole modules as experts; use shared=nothing"
        )
    if layers[0].memory is not None and (_is_whole(recipe) or any(site.heads > 1 for site in sites)):
        raise ValueError(
            "a memory looks up the ids of whole tokens beside a feed-forward network; use memory=nothing with whole "
            "modules as experts and with sub-tokens"
        )
    if _is_copy(recipe) and layers[0].shared is not None:
        raise ValueError(
            "copied experts beside a shared copy of the same network count it twice; use experts=fresh (with zero=True "
            "the model starts as it was), or shared=nothing"
        )


def _options(maker: Callable) -> tuple[Callable, dict[str, Any]]:
    made, options = (maker.func, maker.keywords) if isinstance(maker, partial) else (maker, {})
    around = made in (masked, with_multiplicative_bias) and "experts" in options
    return _options(options["experts"]) if around else (made, options)


def _is_copy(recipe: Recipe) -> bool:
    maker, options = _options(recipe.experts)
    return maker in (copies, merged, whole_modules) and options.get("scale", 1.0) == 1.0


def _is_whole(recipe: Recipe) -> bool:
    return _options(recipe.experts)[0] is whole_modules
