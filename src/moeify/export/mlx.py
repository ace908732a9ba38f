"""Export for MLX: a class of transformers that mlx-lm computes in the same way, with logits compared in MLX too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.export.attention_rules import Rope
from moeify.export.exporter import Exporter, Verification
from moeify.export.families import SPARSE, Family
from moeify.export.hf_folder import HfFolder, write_hf_folder
from moeify.export.layer_rules import AllSparse, SharedCount, SharedWidth, SomeShared
from moeify.export.match import Match, best_match
from moeify.export.model_spec import Unsupported
from moeify.export.probe import Probe
from moeify.export.read import spec_of
from moeify.export.rules import Always, Rule, Traits

_ROUNDING = 1e-4


@dataclass(frozen=True)
class Yarn(Rope):
    """Rotary positions with YaRN, the only ones that mlx-lm's DeepSeek-V2 reads."""

    def write(self, value: dict[str, Any], traits: Traits) -> dict[str, Any]:
        """All parameters."""
        if value["rope_type"] != "yarn":
            raise Unsupported(f"mlx-lm's class reads rope scaling 'yarn' only, the model has {value['rope_type']!r}")
        return super().write(value, traits)


_SOME_SHARED = SomeShared(SharedCount("n_shared_experts"), "plain")
_OTHERWISE: Mapping[str, Mapping[str, Rule]] = {
    "qwen2_moe": {
        "qkv_bias": Always(True),
        "normalize": Always(False),
        "shared": SomeShared(SharedWidth("shared_expert_intermediate_size", "gated"), "gated"),
        "sparse_layers": AllSparse(),
        "tied": Always(False),
    },
    "glm4_moe": {"tied": Always(False), "shared": _SOME_SHARED},
    "deepseek_v2": {"tied": Always(False), "shared": _SOME_SHARED, "rope": Yarn()},
    "deepseek_v3": {"tied": Always(False), "shared": _SOME_SHARED},
    "dots1": {"shared": _SOME_SHARED},
    **{name: {} for name in ("mixtral", "qwen3_moe", "olmoe")},
}
"""The classes that mlx-lm has, and the traits that it computes differently from transformers."""


@dataclass(frozen=True)
class MlxFolder(Exporter):
    """A folder that `mlx_lm.load` reads, and transformers too."""

    def match(self, model: nn.Module) -> Match[Family]:
        """The class, and the model expressed in its terms.

        Raises:
            Unsupported: no class that mlx-lm has computes what the model does.
        """
        return best_match(spec_of(model), [_family(name, rules) for name, rules in _OTHERWISE.items()], "mlx-lm")

    def write(self, model: Any, folder: Path) -> list[str]:
        """Write what `HfFolder` writes."""
        return write_hf_folder(self.match(model), model, folder)

    def verify(self, folder: Path, probe: Probe) -> Verification:
        """Load the folder with transformers, and with MLX."""
        try:
            import mlx_lm
            from mlx_lm.utils import load_model
        except ImportError:
            raise ImportError("to compare with MLX, pip install mlx-lm, and on Linux 'mlx[cpu]'") from None
        by_transformers = HfFolder().verify(folder, probe)
        model, _ = load_model(folder)
        logits = _logits(model, probe)
        difference = probe.difference(logits)
        if difference > _ROUNDING * max(1.0, probe.size):
            raise ValueError(f"MLX gives other logits than the model, by {difference:.3g}")
        return Verification(f"mlx-lm {mlx_lm.__version__}", difference, probe.agreement(logits), str(by_transformers))


def _family(name: str, rules: Mapping[str, Rule]) -> Family:
    family = SPARSE[name]
    untied = {"tie_word_embeddings": False} if "tied" in rules else {}
    return replace(family, differs={**family.differs, **rules}, settings={**family.settings, **untied})


def _logits(model: Any, probe: Probe) -> Tensor:
    import mlx.core as mx
    import numpy as np

    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(probe.ids.numpy())).astype(mx.float32)))
