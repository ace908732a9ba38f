"""Export sparse models to other programs: classes of transformers, GGUF, MLX, ONNX and OpenVINO, without moeify."""

from moeify.export.compatibility import Compatibility, compatibility
from moeify.export.exporter import (
    Export,
    Exporter,
    Verification,
    exporters,
    find_exporter,
    register_exporter,
    supports,
    verify,
    write,
)
from moeify.export.gguf_file import GgufFile
from moeify.export.hf_folder import HfFolder
from moeify.export.mlx import MlxFolder
from moeify.export.model_spec import ModelSpec, Unsupported
from moeify.export.onnx import OnnxFolder
from moeify.export.openvino import OpenVinoFolder
from moeify.export.probe import Probe
from moeify.export.routers import TokenChoice, token_choice_of

register_exporter("transformers", HfFolder())
register_exporter("gguf", GgufFile())
register_exporter("mlx", MlxFolder())
register_exporter("onnx", OnnxFolder())
register_exporter("openvino", OpenVinoFolder())

__all__ = [
    "Compatibility",
    "Export",
    "Exporter",
    "GgufFile",
    "HfFolder",
    "MlxFolder",
    "ModelSpec",
    "OnnxFolder",
    "OpenVinoFolder",
    "Probe",
    "TokenChoice",
    "Unsupported",
    "Verification",
    "compatibility",
    "exporters",
    "find_exporter",
    "register_exporter",
    "supports",
    "token_choice_of",
    "verify",
    "write",
]
