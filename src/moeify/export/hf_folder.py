"""Export to classes of transformers, which load without moeify."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.export.exporter import Exporter, Verification
from moeify.export.families import SPARSE, Family
from moeify.export.match import Match, best_match, match
from moeify.export.model_spec import Unsupported
from moeify.export.probe import Probe, logits_of
from moeify.export.read import spec_of
from moeify.export.switch import SWITCH, is_switch, switch_spec
from moeify.files import read_json, write_json
from moeify.registry import suggest

_EMBEDDINGS = ("embed_tokens.weight", "shared.weight")
_ROUNDING = 1e-4
"""Differences of logits, relative to the largest, that a different order of additions may cause."""


@dataclass(frozen=True)
class HfFolder(Exporter):
    """A folder that `AutoModelForCausalLM.from_pretrained` and other programs for models of transformers read.

    Attributes:
        model_type: of the class to write; by default the one that needs the fewest rewrites.
        max_shard_size: weights beyond this size are spread over several files.
    """

    model_type: str | None = None
    max_shard_size: str = "5GB"

    def match(self, model: nn.Module) -> Match[Family]:
        """The class, and the model expressed in its terms.

        Raises:
            Unsupported: no class, or not the requested one, computes what the model does.
        """
        classes = {SWITCH.model_type: SWITCH} if is_switch(model) else SPARSE
        spec = switch_spec(model) if is_switch(model) else spec_of(model)
        if self.model_type is None:
            found = best_match(spec, classes.values(), "transformers")
        elif self.model_type in classes:
            found = match(spec, classes[self.model_type])
        else:
            raise Unsupported(
                f"transformers has no MoE class {self.model_type!r} for it; {suggest(self.model_type, [*classes])}"
            )
        build(found, model)
        return found

    def write(self, model: Any, folder: Path) -> list[str]:
        """Write `config.json`, the weights in the layout of released checkpoints, and generation settings."""
        return write_hf_folder(self.match(model), model, folder, self.max_shard_size)

    def verify(self, folder: Path, probe: Probe) -> Verification:
        """Load the folder with transformers, in fp32."""
        import transformers

        options = {"dtype": torch.float32, "experts_implementation": "eager", "local_files_only": True}
        with _quiet():
            model, report = _auto_model(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(
                folder, output_loading_info=True, **options
            )
        wrong = {kind: sorted(names) for kind, names in report.items() if names}
        if wrong:
            raise ValueError(f"transformers reads {folder} with faults: {wrong}")
        logits = logits_of(model.eval(), probe.ids)
        difference = probe.difference(logits)
        if difference > _ROUNDING * max(1.0, probe.size):
            raise ValueError(
                f"{type(model).__name__} of transformers gives other logits than the model, by {difference:.3g}"
            )
        program = f"transformers {transformers.__version__}, {type(model).__name__}"
        return Verification(program, difference, probe.agreement(logits))


def write_hf_folder(found: Match[Family], model: Any, folder: Path, max_shard_size: str = "5GB") -> list[str]:
    """Write a folder of transformers; return the class and the rewrites, described for the user.

    Args:
        found: the class and what to write for it.
        model: what is exported, for its generation settings.
        folder: where to.
        max_shard_size: weights beyond this size are spread over several files.

    Raises:
        Unsupported: the class lacks a tensor of the model, or needs one that the model lacks.
    """
    built = build(found, model)
    with _quiet():
        built.save_pretrained(folder, max_shard_size=max_shard_size)
    _add_former_fields(folder / "config.json")
    return [f"{found.family.title} ({type(built).__name__})", *found.rewrites]


def build(found: Match[Family], model: Any) -> Any:
    """The model of transformers that a match describes; its tensors are those of the spec.

    Args:
        found: the class and what to write for it.
        model: what was exported, for its generation settings.

    Raises:
        Unsupported: the class lacks a tensor of the model, or needs one that the model lacks.
    """
    from transformers import AutoConfig

    tensors = found.tensors()
    dtype = next(tensor for name, tensor in tensors.items() if name.endswith(_EMBEDDINGS)).dtype
    config = AutoConfig.for_model(found.family.model_type, **found.fields, dtype=dtype)
    with torch.device("meta"), _quiet():
        built = _auto_model(config).from_config(config)
    wanted = built.state_dict()
    if found.spec.traits.get("tied"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    lost, missing = tensors.keys() - wanted.keys(), wanted.keys() - tensors.keys()
    if lost or missing:
        raise Unsupported(
            f"{found.family.title} has no place for {', '.join(sorted(lost)[:3]) or 'nothing'} and lacks "
            f"{', '.join(sorted(missing)[:3]) or 'nothing'} of {len(missing)} tensors"
        )
    placed = {name: tensor.reshape(wanted[name].shape) for name, tensor in tensors.items()}
    built.load_state_dict(placed, assign=True)
    built.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = model.generation_config
    return built.eval()


def _auto_model(config: Any) -> Any:
    import transformers

    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def _add_former_fields(path: Path) -> None:
    """Add positions and the number of experts under the names that transformers 4 used, which other programs read.

    A program that finds no `rope_theta` uses its own default, and generates fluent text from other logits.
    """
    values = read_json(path)
    if (rope := values.get("rope_parameters")) is None:
        return
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    former = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
    if "partial_rotary_factor" in rope:
        former["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if "num_local_experts" in values:
        former["num_experts"] = values["num_local_experts"]
    write_json(path, former | values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager without progress bars for a copy and warnings about networks of width 0."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
