"""Context managers for evaluation mode and fixed random numbers; afterwards every submodule has its former mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has the mode it had, also where these differ."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def fixed_randomness(model: nn.Module) -> Iterator[None]:
    """The same random numbers every time; afterwards the generators have the state they had."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield
