"""Whether the attention around a sparse layer is causal: by its attributes, or by the masks that it is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.find.shapes import Site
from moeify.routers.base import Router


def refuse_decoders(model: nn.Module, sites: Sequence[Site], router: Router) -> list[Callable[[], None]]:
    """Refuse a router that looks at later tokens in a decoder, now or in the call that shows it to be one.

    Returns: A function that removes the hooks on calls.

    Raises:
        ValueError: a site is in a decoder.
    """
    for site in sites:
        if in_decoder(model, site):
            raise ValueError(_looks_ahead(site, router))
    first_of_stack = {site.stack: site for site in reversed(sites)}
    return [
        handle.remove
        for site in first_of_stack.values()
        for handle in refuse_causal_calls(_layer_of(model, site), _looks_ahead(site, router))
    ]


def in_decoder(model: nn.Module, site: Site) -> bool:
    """Whether the layer around a site attends to earlier tokens only, by its attributes."""
    return says_causal(_layer_of(model, site))


def _layer_of(model: nn.Module, site: Site) -> nn.Module:
    return model.get_submodule(site.layer) if site.layer else model


def _looks_ahead(site: Site, router: Router) -> str:
    return (
        f"{site.name} is in a decoder, and {type(router).__name__} decides by looking at later tokens: training would "
        "leak the future and generation would differ; choose a causal router, such as that of a recipe without * in "
        "`moeify recipes`, or pass allow_noncausal=True"
    )


def says_causal(layer: nn.Module) -> bool:
    """Whether a layer attends to earlier tokens only, by the attributes of its attention."""
    return any(
        getattr(part, "is_causal", False) is True
        or getattr(part, "is_decoder", False) is True
        or isinstance(part, nn.TransformerDecoderLayer)
        for part in layer.modules()
    )


def refuse_causal_calls(layer: nn.Module, reason: str) -> list[RemovableHandle]:
    """Raise `reason` as soon as a layer, or attention in it, is called with `is_causal=True` or a causal mask.

    Some layers learn only then that they are in a decoder: those of CLIP's text model and of `nn.TransformerEncoder`.
    """
    heard = [part for part in layer.modules() if part is layer or "Attention" in type(part).__name__]
    hook = partial(_refuse, reason)  # not a closure, which could not be pickled with the model
    return [part.register_forward_pre_hook(hook, with_kwargs=True) for part in heard]


def _refuse(reason: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if kwargs.get("is_causal") is True or any(map(_hides_the_future, (*args, *kwargs.values()))):
        raise ValueError(reason)


def _hides_the_future(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dim() < 2 or not 1 < value.shape[-1] == value.shape[-2]:
        return False
    return not torch.compiler.is_compiling() and is_causal_mask(value)


def is_causal_mask(mask: Bool[Tensor, "... N N"] | Float[Tensor, "... N N"]) -> bool:
    """Whether a mask lets tokens look at themselves and earlier ones, but never at later ones.

    Masks of floats are added to scores. Of bools, torch marks what is hidden and transformers what is seen, so that
    only the difference between later tokens and the others decides. Padding after a first token is no causal mask.
    """
    if mask.dtype is not torch.bool:
        if not mask.is_floating_point():
            return False
        mask = mask < -1e4
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    future, present, past = mask[..., later], mask.diagonal(dim1=-2, dim2=-1)[..., 1:], mask[..., later.mT]
    hidden = future.flatten()[0]
    return bool((future == hidden).all() & (present != hidden).any() & (past != hidden).any())
