"""`verified`: run a model on a probe to check that its sites were read correctly, and record how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moeify.find.alone import same_alone
from moeify.find.dense import DenseFFN
from moeify.find.layout import called_alike, laid_out, observed
from moeify.find.padding import padding_routed
from moeify.find.probe import Probe, as_probe, find_probe
from moeify.find.shapes import Site
from moeify.modes import fixed_randomness
from moeify.sparsify.comparison import Comparison


def verified(
    model: nn.Module, sites: Sequence[Site], given: Any = None, *, whole: bool = False
) -> tuple[Comparison, list[Site]]:
    """The dense model's outputs on a probe, and the sites with what the probe shows of their calls and tokens.

    Args:
        model: the dense model.
        sites: where sparse layers will be inserted.
        given: a probe (a tensor, a tuple of arguments or a mapping); by default one is guessed.
        whole: whether experts will be whole modules, which compute padding as the module that they are copies of.

    Raises:
        ValueError: as of `Plan.verify`.
    """
    with fixed_randomness(model):
        probe = find_probe(model) if given is None else as_probe(given).by_name(model)
        if probe is None:
            raise ValueError(_no_probe(model))
        with observed(model, sites) as calls:
            compare = _run(model, probe)
    sites = called_alike(sites, calls, whole=whole)
    rebuilt = [site for site in sites if isinstance(site.dense, DenseFFN)]
    if not _same_with(model, rebuilt, compare):
        culprit = next((site for site in rebuilt if not _same_with(model, [site], compare)), rebuilt[0])
        raise ValueError(_misread(culprit))
    for site in rebuilt:
        if site.name not in calls:
            _verify_alone(model, site)
    sites = laid_out(model, sites, probe, calls)
    return compare, sites if whole else padding_routed(model, sites, probe)


def _run(model: nn.Module, probe: Probe) -> Comparison:
    try:
        return Comparison.of(model, probe)
    except MemoryError:  # no evidence about the model
        raise
    except Exception as error:  # any error means that the model does not accept the input
        raise ValueError(
            f"this {type(model).__name__} cannot be run on the probe: {type(error).__name__}: {error}"
        ) from error


def _same_with(model: nn.Module, sites: Sequence[Site], compare: Comparison) -> bool:
    undo = [site.install(site.dense) for site in sites]
    try:
        return compare.same(model)
    except MemoryError:  # no evidence about the model
        raise
    except Exception:  # any error means that a site was misread
        return False
    finally:
        for restore in reversed(undo):
            restore()


def _verify_alone(model: nn.Module, site: Site) -> None:
    same = same_alone(model, site)
    if same is None:
        raise ValueError(
            f"the probe does not reach {site.name}, so that nothing shows whether its `DenseFFN` is right; pass one "
            "that does as probe=..., leave it out with where=named(...), or go without with verify=False"
        )
    if not same:
        raise ValueError(_misread(site))


def _misread(site: Site) -> str:
    return (
        f"{site.name} was read as a feed-forward network, but the model computes something else there than "
        "down(act(up(x))); leave it out with where=named(...), or make whole copies of a module with "
        "where=modules(...)"
    )


def _no_probe(model: nn.Module) -> str:
    if any(parameter.is_meta for parameter in model.parameters()):
        return (
            f"this {type(model).__name__} has no values (its parameters are on the meta device), so that nothing can "
            "be verified; load them first, or go without with verify=False"
        )
    return (
        f"no input could be guessed for this {type(model).__name__}, so that nothing shows whether the sparse model "
        "computes what the dense one does; pass one as probe=... (a tensor, a tuple of arguments or a mapping), or go "
        "without with verify=False"
    )
