"""Export to ONNX: a graph for ONNX Runtime, whose outputs are compared with the model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from moeify.export.calls import Inputs
from moeify.export.graph import GraphExporter, main_output


@dataclass(frozen=True)
class OnnxFolder(GraphExporter):
    """A folder with `model.onnx` and its weights."""

    extra: ClassVar[str] = "onnx"

    def export(self, model: Any, inputs: Inputs) -> Any:
        """The graph, as the exporters of transformers return it."""
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        return OnnxExporter().export(model, {**inputs}, config=OnnxConfig(dynamic=True))

    def runner(self, folder: Path) -> tuple[str, Callable[[Inputs], torch.Tensor]]:
        """ONNX Runtime on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Inputs) -> torch.Tensor:
            return main_output(names, session.run(None, {name: value.numpy() for name, value in inputs.items()}))

        return f"onnxruntime {onnxruntime.__version__}", run
