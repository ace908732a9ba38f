"""Export to OpenVINO: a graph whose outputs are compared with the model's, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from moeify.engram import Engram
from moeify.export.calls import Inputs
from moeify.export.graph import GraphExporter, main_output


@dataclass(frozen=True)
class OpenVinoFolder(GraphExporter):
    """A folder with `openvino_model.xml` and its weights.

    OpenVINO computes in bf16 on processors that have it; its setting `INFERENCE_PRECISION_HINT=f32` computes exactly.
    """

    extra: ClassVar[str] = "openvino"

    def obstacle(self, model: nn.Module) -> str | None:
        """A memory of n-grams, whose hashes need 64 bits."""
        memory = next((name for name, part in model.named_modules() if isinstance(part, Engram)), None)
        if memory is None:
            return None
        return f"its memory of n-grams ({memory}) hashes with 64-bit integers, and OpenVINO computes with 32 bits"

    def export(self, model: Any, inputs: Inputs) -> Any:
        """The graph, as the exporters of transformers return it."""
        from transformers.exporters.exporter_openvino import OpenVINOConfig, OpenVINOExporter

        return OpenVINOExporter().export(model, {**inputs}, config=OpenVINOConfig(dynamic=True))

    def runner(self, folder: Path) -> tuple[str, Callable[[Inputs], torch.Tensor]]:
        """OpenVINO on the CPU, in fp32."""
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        graph = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", exact)
        names = [output.any_name for output in graph.outputs]

        def run(inputs: Inputs) -> torch.Tensor:
            found = graph({name: value.numpy() for name, value in inputs.items()})
            return main_output(names, [found[output] for output in graph.outputs])

        return f"openvino {openvino.__version__.split('-')[0]}", run
