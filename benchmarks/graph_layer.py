"""The experts of a layer as a graph of transformers' own class in ONNX Runtime and OpenVINO: peers where installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allowance import LEFT_OUT
from jaxtyping import Float, Int
from llama_build import BEYOND, flags
from torch import Tensor, nn

from moeify.export.onnx import OnnxFolder
from moeify.export.openvino import OpenVinoFolder

ENGINES = {"onnxruntime": OnnxFolder, "openvino": OpenVinoFolder}
"""The packages that run a graph, and our exports to them."""
INPUTS = ("hidden_states", "top_k_index", "top_k_weights")
SOME = 5  # tokens of the trace, whose graph serves any number


def why_not(engine: str, dtype: torch.dtype) -> str | None:
    """The reason why an engine is no peer in a dtype, for its row; None if it is one."""
    if importlib.util.find_spec(engine) is None:
        return f"{LEFT_OUT}not installed"
    if engine == "onnxruntime" and dtype != torch.float32:
        return f"{LEFT_OUT}it has no products in bf16 on a CPU"
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2" and flags() & set(BEYOND.values()):
        return f"{LEFT_OUT}it uses instructions beyond AVX2 where there are any"
    return None


def export(engine: str, experts: nn.Module, k: int) -> tempfile.TemporaryDirectory[str]:
    """A folder with the graph of experts, for any number of tokens.

    Args:
        engine: one of `ENGINES`.
        experts: those of a Mixtral.
        k: experts of a token.
    """
    experts_of: Any = experts
    width, dtype = experts_of.down_proj.shape[1], experts_of.down_proj.dtype
    values = (torch.randn(SOME, width, dtype=dtype), torch.arange(k).repeat(SOME, 1), torch.ones(SOME, k, dtype=dtype))
    folder = tempfile.TemporaryDirectory()
    before, experts_of.config._experts_implementation = experts_of.config._experts_implementation, "grouped_mm"
    try:
        graph = ENGINES[engine]().export(experts, dict(zip(INPUTS, values, strict=True)))
    finally:
        experts_of.config._experts_implementation = before
    graph.save_pretrained(folder.name)
    return folder


class GraphLayer:
    """A graph that an engine has read, with weights of its own, by as many threads as torch has.

    Args:
        engine: one of `ENGINES`.
        folder: what `export` wrote.
        dtype: in which it computes; inputs and outputs are in fp32.
    """

    def __init__(self, engine: str, folder: Path, dtype: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as own:  # as engines may share what they map of one file
            files = shutil.copytree(folder, own, dirs_exist_ok=True)
            self.run = {"onnxruntime": _onnxruntime, "openvino": _openvino}[engine](Path(files), dtype)

    def __call__(self, x: Float[Tensor, "T D"], index: Int[Tensor, "T K"], weight: Float[Tensor, "T K"]) -> Tensor:
        """The weighted sum of every token's expert outputs, in memory that the next call may overwrite."""
        values = (x.float().numpy(), index.numpy(), weight.float().numpy())
        return torch.from_numpy(self.run(dict(zip(INPUTS, values, strict=True))))


def _onnxruntime(folder: Path, dtype: torch.dtype) -> Callable[[dict[str, Any]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda values: session.run(None, values)[0]


def _openvino(folder: Path, dtype: torch.dtype) -> Callable[[dict[str, Any]], Any]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }  # fmt: skip
    graph = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
    request = graph.create_infer_request()
    return lambda values: request.infer(values, share_inputs=True, share_outputs=True)[graph.outputs[0]]
