"""Export sparse models to other programs: to classes of transformers, which load without moeify."""

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
from moeify.export.native import Native
from moeify.export.probe import Probe
from moeify.export.routers import Choice, choice_of

register_exporter("transformers", Native())

__all__ = [
    "Choice",
    "Export",
    "Exporter",
    "Form",
    "Misfit",
    "Native",
    "Probe",
    "Verdict",
    "choice_of",
    "exporters",
    "find_exporter",
    "register_exporter",
    "supports",
    "verify",
    "write",
]
