"""Merge several dense models into one sparse model whose experts they are: `merge_models` (Branch-Train-MiX).

    experts of each layer:  W_e = W of model e
    everything else:        W   = base's, or the mean over the models

(arXiv 2403.07816, section 3.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.compose.model_sources import Names, Source, build, refuse_unlike, source_of, tensors
from moeify.compose.router_init import route_by_examples
from moeify.experts.base import Experts
from moeify.experts.blocks import Each
from moeify.find.probe import as_probe, find_probe
from moeify.find.shapes import Site
from moeify.given import named
from moeify.modes import fixed_randomness
from moeify.progress import with_progress
from moeify.sparsify.comparison import Comparison
from moeify.sparsify.convert import convert
from moeify.sparsify.make import copies, merged
from moeify.sparsify.recipe import Recipe, recipe_given
from moeify.sparsify.report import Report

Model = nn.Module | str | Path


def merge_models(
    models: Mapping[str, Model] | Sequence[Model],
    recipe: Recipe | None = None,
    *,
    base: Model | None = None,
    router_init: Mapping[str, Sequence[Any]] | None = None,
    probe: Any = None,
    verify: bool = True,
    allow_noncausal: bool = False,
    verbose: bool = True,
) -> nn.Module:
    """Make one sparse model of several dense ones of the same kind: each becomes one expert in every sparse layer.

    The models stay as they are. Of models given as paths, only one layer at a time is in memory beside the new model.

    Args:
        models: modules, or folders of saved models; by name, if the experts are to have names other than 0, 1, ...
        recipe: which layers become sparse and their routers; `Recipe()` if not given. Its experts are
            the models, and `num_experts` their number.
        base: gives all tensors that are in no expert, and the dtype; without it they are the mean over the models.
        router_init: for each name, example inputs of the domain that its expert is for (each a tensor, a tuple of
            arguments or a mapping), see `route_by_examples`; without it routers start as the recipe makes them.
        probe: as in `sparsify`.
        verify: as in `sparsify`.
        allow_noncausal: as in `sparsify`.
        verbose: print the table of `sparsify`; its function difference is to the base, or to the first model.

    Raises:
        ValueError: models that differ in more than their values, where the message names the tensor or setting (models
            of two classes, Llama and Mistral say, must compute the same with the same tensors); and
            as in `sparsify`.
        FileNotFoundError: a path without a model.
        TypeError: one model alone, or something that is neither a model nor a path.
    """
    if isinstance(models, nn.Module | str | Path):
        raise TypeError(f"expected several models, in a list or by name in a dict, but got {named(models)} alone")
    by_name = dict(models) if isinstance(models, Mapping) else {str(i): model for i, model in enumerate(models)}
    recipe = _recipe_for(list(by_name), Recipe(num_experts=len(by_name) or 1) if recipe is None else recipe)
    if router_init is not None and dict(router_init).keys() != by_name.keys():
        raise ValueError(f"router_init has examples for {sorted(router_init)}, and the models are {sorted(by_name)}")
    model = build(next(iter(by_name.values())) if base is None else base)
    sources = [source_of(name, each, model) for name, each in by_name.items()]
    for each in sources:
        refuse_unlike(each, model)

    own = tensors(model)
    with fixed_randomness(model):
        found = as_probe(probe) if probe is not None else find_probe(model) if verify else None
        compare = None if found is None else Comparison.of(model, found)
    report = convert(model, recipe, probe=probe, verify=verify, allow_noncausal=allow_noncausal)
    inside = _fill_experts(report, sources, own)
    for group, tensor in own.items() if base is None else ():
        if id(tensor) not in inside:
            _average(tensor, group, sources)
    if router_init is not None:
        route_by_examples(model, router_init)
    if verbose:
        difference = None if compare is None else compare.difference(model)
        dataclasses.replace(report, difference=difference).show()
    return model


def _fill_experts(report: Report, sources: list[Source], own: Mapping[Names, Tensor]) -> set[int]:
    """Fill the experts of every layer from the models; returns the tensors of the base that they replace, by id."""
    names = {id(tensor): group for group, tensor in own.items()}
    layers = list(zip(report.sites, report.layers, strict=True))
    progress = with_progress(layers, "filling experts from the models")
    filled = [_fill(layer.experts, site, sources, names) for site, layer in progress]
    return set().union(*filled)


def _recipe_for(names: list[str], recipe: Recipe) -> Recipe:
    recipe = recipe_given(recipe)
    maker = recipe.experts.func if isinstance(recipe.experts, partial) else recipe.experts
    if maker not in (copies, merged):
        raise ValueError(
            f"the recipe makes experts with {getattr(maker, '__name__', maker)}, but merged models are the experts "
            "themselves; leave experts out of the recipe"
        )
    if not names:
        raise ValueError("there is no model to merge; give at least one")
    if recipe.num_experts != len(names):
        raise ValueError(
            f"the recipe has num_experts={recipe.num_experts}, but there are {len(names)} models, and each becomes one "
            f"expert; set num_experts={len(names)}, or give more models"
        )
    return dataclasses.replace(recipe, num_experts=len(names), experts=partial(merged, names=names))


@torch.no_grad()
def _fill(experts: Experts, site: Site, sources: list[Source], names: dict[int, Names]) -> set[int]:
    """Give every expert the weights that its model has at a site; returns the tensors that were given to experts.

    Trainable parameters of an activation are shared by the experts, and are means over the models.
    """
    inside = [tensor for key, tensor in site.dense.state_dict(keep_vars=True).items() if not key.startswith("act.")]
    for e, model in enumerate(sources):
        for tensor in inside:
            tensor.copy_(model.first(names[id(tensor)]))
        for own, new in zip(_parts(experts, e), _parts(copies(site.dense, 1), 0), strict=True):
            own.copy_(new)
    return {id(tensor) for tensor in inside}


def _parts(experts: Experts, e: int) -> list[Tensor]:
    """What one expert consists of."""
    if isinstance(experts, Each):
        return list(experts.experts[e].state_dict(keep_vars=True).values())
    common = {id(parameter) for module in experts.common_modules() for parameter in module.parameters()}
    return [stacked[e] for stacked in experts.parameters() if id(stacked) not in common]


@torch.no_grad()
def _average(tensor: Tensor, names: Names, sources: list[Source]) -> None:
    """Put the mean over the models into a tensor, added up in fp64; integers are the first model's."""
    if tensor.is_floating_point():
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for model in sources:
            total += model.first(names).to(total.device)
        tensor.copy_(total / len(sources))
