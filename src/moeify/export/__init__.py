"""Export sparse models to other programs: classes of transformers, which load without moeify, GGUF files, and MLX."""

from moeify.export.exporter import (
    Export,
    Exporter,
    Verdict,
    exporters,
    find_exporter,
    register_exporter,
    supports,
    verify,
    write,
)
from moeify.export.form import Form, Misfit
from moeify.export.gguf_file import Gguf
from moeify.export.mlx import Mlx
from moeify.export.native import Native
from moeify.export.plan import Outlook, plan
from moeify.export.probe import Probe
from moeify.export.routers import Choice, choice_of

register_exporter("transformers", Native())
register_exporter("gguf", Gguf())
register_exporter("mlx", Mlx())

__all__ = [
    "Choice",
    "Export",
    "Exporter",
    "Form",
    "Gguf",
    "Misfit",
    "Mlx",
    "Native",
    "Outlook",
    "Probe",
    "Verdict",
    "choice_of",
    "exporters",
    "find_exporter",
    "plan",
    "register_exporter",
    "supports",
    "verify",
    "write",
]
