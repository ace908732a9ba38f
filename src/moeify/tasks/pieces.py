"""Count the pieces (tokens, patches, frames) that a model makes of a sample, by which its FLOPs are counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeify.find.where import candidates
from moeify.modes import in_evaluation


@torch.no_grad()
def pieces(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """The most rows that a feed-forward network of the dense model reads for one sample.

    Args:
        model: a dense model.
        inputs: of one sample by name, without the dimension of the batch.

    Raises:
        ValueError: the model does not fit the inputs, or has no feed-forward network.
    """
    sites, _ = candidates(model)
    if not sites:
        raise ValueError(f"no feed-forward network was found in this {type(model).__name__}")
    seen = [0]

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[:-1].numel())

    handles = [model.get_submodule(site.name).register_forward_pre_hook(see) for site in sites if site.name]
    batch = {name: torch.as_tensor(value).unsqueeze(0) for name, value in inputs.items()}
    try:
        with in_evaluation(model):
            model(**batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{type(model).__name__} does not take a sample of this task, {given}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    return max(1, *seen)
