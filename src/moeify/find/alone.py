"""Verify a site (a feed-forward network to replace) that no forward pass reaches, by running a parent module alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moeify.find.probe import restored
from moeify.find.shapes import Site
from moeify.modes import fixed_randomness, in_evaluation


def same_alone(model: nn.Module, site: Site) -> bool | None:
    """Whether the module around a site computes the same with the `DenseFFN` that was read from the site.

    The module is the innermost one around the site that runs on hidden states alone.

    Returns:
        None if no module up to the site's numbered layer can be run by itself.
    """
    if not site.disabled:
        return True  # a module of its own, which was compared when it was read
    parts = site.name.split(".")
    for end in range(len(parts) - 1, len(site.layer.split(".")) - 1 if site.layer else 0, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        before = _output(owner, site)
        if before is None:
            continue
        undo = site.install(site.dense)
        try:
            after = _output(owner, site)
        finally:
            undo()
        rounding = torch.finfo(before.dtype).eps ** 0.5
        return after is not None and bool((before - after).abs().max() <= rounding * before.abs().max())
    return None


@torch.no_grad()
def _output(owner: nn.Module, site: Site) -> Tensor | None:
    """The first output of a module for random hidden states, None if it refuses them or does not reach the site."""
    weight = next(site.dense.parameters())
    x = torch.randn(2, 5, site.width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    _, *others = inspect.signature(owner.forward).parameters.values()
    required = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    given: dict[str, Any] = dict.fromkeys(required)
    if "cu_seqlens" in given:  # sequences one behind the other
        x, given["cu_seqlens"] = x.flatten(0, 1), torch.tensor([0, 5, 10], dtype=torch.int32, device=weight.device)
    reached: list[bool] = []
    handle = getattr(*site.place).register_forward_pre_hook(lambda module, args: reached.append(True))
    try:
        with restored(owner), in_evaluation(owner), fixed_randomness(owner):
            output = owner(x, **given)
    except MemoryError:  # no evidence about the module
        raise
    except Exception:  # any error means that it cannot be run alone
        return None
    finally:
        handle.remove()
    output = output[0] if isinstance(output, tuple) else output
    return output.float() if reached and isinstance(output, Tensor) else None
