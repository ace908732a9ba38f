"""The report of a model's or a trace's routing: every panel that its data allow, in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeify.inspect.capture import capture
from moeify.inspect.html_page import write_page
from moeify.inspect.measurements.layer_inputs import layer_inputs
from moeify.inspect.measurements.masking import chosen_experts, masked_effects
from moeify.inspect.measurements.outliers import expert_outputs
from moeify.inspect.measurements.pairwise import pairwise_similarity
from moeify.inspect.panels.causal import causal
from moeify.inspect.panels.coactivation import coactivation
from moeify.inspect.panels.coloured_text import coloured_text
from moeify.inspect.panels.coverage import coverage
from moeify.inspect.panels.dead import dead
from moeify.inspect.panels.drops import drops
from moeify.inspect.panels.entropy import entropy
from moeify.inspect.panels.importance import importance
from moeify.inspect.panels.load_by_layer import load_by_layer
from moeify.inspect.panels.margin import margin
from moeify.inspect.panels.over_training import over_training
from moeify.inspect.panels.panel import NotMeasured, Panel
from moeify.inspect.panels.patches import patches
from moeify.inspect.panels.paths import paths
from moeify.inspect.panels.reuse import reuse
from moeify.inspect.panels.saturation import saturation
from moeify.inspect.panels.similarity import similarity
from moeify.inspect.panels.slots import slots
from moeify.inspect.panels.specialisation import specialisation
from moeify.inspect.panels.super_experts import super_experts
from moeify.inspect.panels.top_tokens import top_tokens
from moeify.inspect.panels.violation import violation
from moeify.inspect.trace import Trace
from moeify.layers import HfLayer, sparse_layers

Maker = Callable[[], Panel | Sequence[Panel]]

OF_TRACES: dict[str, dict[str, Callable[[Trace], Panel | Sequence[Panel]]]] = {
    "Load": {
        "load": load_by_layer, "violation": violation, "dead experts": dead, "importance": importance,
        "coverage": coverage, "drops": drops,
    },
    "Router": {"router entropy": entropy, "margin": margin},
    "Specialisation": {"specialisation": specialisation, "top tokens": top_tokens},
    "Structure": {"co-activation": coactivation, "paths across layers": paths, "slots of Soft MoE": slots},
    "Text": {"coloured text": coloured_text},
    "Time": {"experts in use again": reuse},
}  # fmt: skip
"""The panels that need only a trace, by tab and by name."""


@dataclass
class Report:
    """Panels by tab, and the panels that could not be made.

    Attributes:
        title: the name of the model or trace.
        facts: about it, by name.
        groups: the panels by tab.
        reasons: the panels that are not shown, by the reason.
    """

    title: str
    facts: dict[str, Any]
    groups: dict[str, list[Panel]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """The panels that are not shown, and why."""
        return [f"{', '.join(names)}: {reason}" for reason, names in self.reasons.items()]

    @property
    def panels(self) -> list[Panel]:
        """All panels."""
        return [panel for group in self.groups.values() for panel in group]

    def add(self, group: str, name: str, make: Maker) -> None:
        """Put a panel into a tab, or keep the reason why there is none."""
        try:
            made = make()
        except NotMeasured as reason:
            self.reasons.setdefault(str(reason), []).append(name)
            return
        self.groups.setdefault(group, []).extend([made] if isinstance(made, Panel) else made)

    def write(self, file: str | Path) -> None:
        """Write the page.

        Raises:
            ValueError: there is no panel.
        """
        if not self.panels:
            raise ValueError(f"there is nothing to show of {self.title}: {'; '.join(self.missing)}")
        write_page(Path(file), self.title, self.facts, self.groups, self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Facts, and the numbers and advice of every panel, as plain values for JSON."""
        panels = [panel.to_dict() | {"group": group} for group, made in self.groups.items() for panel in made]
        return {"title": self.title, "facts": self.facts, "panels": panels, "missing": self.missing}


def report(
    source: nn.Module | Trace,
    data: Iterable[Any] | None = None,
    *,
    file: str | Path | None = None,
    title: str | None = None,
    tokenizer: Any = None,
    generate: int = 0,
    measure: bool = True,
    checkpoints: Mapping[int, nn.Module | Trace] | None = None,
    log: Sequence[Mapping[str, Any]] | None = None,
) -> Report:
    """A report on the routing of a model or a trace: all panels that the data allow, each with advice.

    Args:
        source: a model with sparse layers, moeify's or of transformers, or a trace.
        data: batches for the model, see `moeify.inspect.capture.capture`; images as `pixel_values`.
        file: the HTML file to write; None for no file.
        title: of the page; by default the name of the model.
        tokenizer: gives the text of the tokens.
        generate: how many tokens the model generates after every batch, to show decoding separately.
        measure: also compare experts and mask some of them, which runs the model about 50 times more.
        checkpoints: earlier states of the model by step, or their traces of the same data.
        log: the lines of `metrics.jsonl` of a training.

    Raises:
        ValueError: a model without data, or without sparse layers.
    """
    batches = [] if data is None else list(data)
    if isinstance(source, nn.Module) and not batches:
        raise ValueError("a model shows its routing only on data; pass batches of inputs as data=")
    trace = source if isinstance(source, Trace) else capture(source, batches, tokenizer=tokenizer, generate=generate)
    made = Report(title or str(trace.header.get("model") or "A trace"), facts_of(trace))
    if isinstance(source, nn.Module) and (remarks := _remarks(source)):
        made.facts["note"] = remarks
    for group, functions in OF_TRACES.items():
        for name, function in functions.items():
            made.add(group, name, lambda function=function: function(trace))
    if images := _images(batches):
        made.add("Images", "image patches", lambda: patches(trace, images))
    if isinstance(source, nn.Module) and measure:
        _add_measurements(made, source, batches, trace)
    if checkpoints:
        traces = {step: _traced(state, batches) for step, state in checkpoints.items()}
        made.add("Time", "saturation", lambda: saturation(traces))
    if log:
        made.add("Time", "training", lambda: over_training(log))
    if file is not None:
        made.write(file)
    return made


def _add_measurements(made: Report, model: nn.Module, batches: Sequence[Any], trace: Trace) -> None:
    """The panels that need the weights."""
    if any(parameter.is_meta for parameter in model.parameters()):
        reason = "the weights of this model stay on disk, and are read for one pass at a time"
        made.reasons[reason] = ["similarity of experts", "super experts", "causal score"]
        return
    seen = layer_inputs(model, batches)
    made.add("Experts", "similarity of experts", lambda: similarity(pairwise_similarity(seen)))
    made.add("Experts", "super experts", lambda: super_experts(expert_outputs(seen)))

    def masked() -> Panel:
        try:
            effects = masked_effects(model, batches[:4], chosen_experts(trace))
        except ValueError as reason:
            raise NotMeasured(str(reason)) from None
        return causal(effects, sum(layer.num_experts for layer in trace))

    made.add("Experts", "causal score", masked)


def _remarks(model: nn.Module) -> str:
    """What one must know about the MoE blocks of the model to understand their decisions."""
    layers = sparse_layers(model).values()
    return " ".join(dict.fromkeys(layer.block.remark for layer in layers if isinstance(layer, HfLayer))).strip()


def _traced(state: nn.Module | Trace, batches: Sequence[Any]) -> Trace:
    return state if isinstance(state, Trace) else capture(state, batches, scores=False)


def _images(batches: Sequence[Any]) -> list[Tensor]:
    """The images of the batches, in order."""
    named = [batch["pixel_values"] for batch in batches if isinstance(batch, Mapping) and "pixel_values" in batch]
    return [image for batch in named if batch.dim() == 4 for image in batch]


def facts_of(trace: Trace) -> dict[str, Any]:
    """Sizes of a trace in words."""
    experts = sorted({layer.num_experts for layer in trace})
    k = sorted({layer.k for layer in trace})
    return {
        "sparse layers": len(trace.layers),
        "experts per layer": _range(experts),
        "experts per token": "all, by weight" if k == [0] else _range(k),
        "tokens": f"{max(map(len, trace.tables)):,}",
        **{name: value for name, value in trace.header.items() if name in ("format", "source")},
    }


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
