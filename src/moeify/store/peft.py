"""Whether PEFT has wrapped modules of a model in adapters, which `save` cannot write."""

from __future__ import annotations

import sys

from torch import nn


def has_adapters(model: nn.Module) -> bool:
    """Whether any module of a model is wrapped by a tuner of PEFT; False if PEFT was never imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())
