"""`modeling_moeify.py`, with which transformers loads a saved model with `trust_remote_code=True`.

If every layer is a top-k mixture of feed-forward networks, the file implements it in plain PyTorch and does not import
moeify; otherwise it imports moeify, and raises an ImportError if that is not installed.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from moeify.files import write_text
from moeify.version import __version__

NAME = "modeling_moeify.py"


def auto_classes(config_class: type) -> dict[str, Any]:
    """The class, or tuple of classes, that each `AutoModel...` of transformers creates for a config class, by name."""
    from transformers.models.auto import modeling_auto

    autos = {name: auto for name, auto in vars(modeling_auto).items() if name.startswith("AutoModel")}
    mappings = {name: auto._model_mapping for name, auto in autos.items() if auto._model_mapping is not None}
    return {name: mapping[config_class] for name, mapping in mappings.items() if config_class in mapping}


def auto_map(architecture: Any) -> dict[str, str]:
    """The `auto_map` entry of a config: the class in the file for `AutoConfig` and for each `AutoModel...`."""
    made = {"AutoConfig": architecture.config_class, **_made(architecture)}
    return {name: f"{NAME.removesuffix('.py')}.Sparse{each.__name__}" for name, each in made.items()}


def _made(architecture: Any) -> dict[str, type]:
    """The dense classes for which the file defines sparse ones, by `AutoModel...`: with and without the head."""
    found = auto_classes(architecture.config_class)
    return {auto: made for auto, made in found.items() if made is architecture or auto == "AutoModel"}


def write_modelling_file(folder: str | Path, architecture: Any, *, is_plain: bool) -> Path:
    """Write the modelling file for sparse models of a class of transformers, and return its path.

    Args:
        folder: folder of the model.
        architecture: the dense class.
        is_plain: whether plain PyTorch suffices, see `standalone_layers`.
    """
    made = _made(architecture)
    classes = list(dict.fromkeys([architecture.__name__, *(each.__name__ for each in made.values())]))
    config = architecture.config_class.__name__
    template, definition = (_PLAIN, _PLAIN_CLASS) if is_plain else (_NEEDS_MOEIFY, _CLASS_OF_MOEIFY)
    text = template.format(
        architecture=architecture.__name__,
        config=config,
        auto=next((auto for auto, each in made.items() if each is architecture), "AutoModel"),
        version=__version__,
        imported=", ".join(sorted({config, *classes})),
        classes="".join(definition.format(name=name, config=config) for name in classes),
        registered="\n".join(
            f"transformers.{auto}.register(Sparse{config}, Sparse{each.__name__}, exist_ok=True)"
            for auto, each in made.items()
        ),
        code=_code(),
    )
    write_text(path := Path(folder) / NAME, text)
    return path


def _code() -> str:
    """The definitions of `standalone.py`, without its docstring and imports."""
    text = (files("moeify") / "store" / "standalone.py").read_text(encoding="utf-8")
    return text[text.index("SCORES = ") :].rstrip()


_PLAIN = '''"""Sparse{architecture}: {architecture} of transformers with mixtures of experts for dense networks.

Written by moeify {version}, and complete without it:

    {auto}.from_pretrained(folder, trust_remote_code=True)
"""

import sys
from contextlib import ExitStack

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import {imported}

{code}


class Sparse{config}({config}):
    """The config of the dense model, with the recipe and what the sparse layers are made of."""

    model_type = "moeify"
{classes}

Sparse{config}.register_for_auto_class()
Sparse{architecture}.register_for_auto_class("{auto}")
{registered}
announce(Sparse{architecture})
'''
_PLAIN_CLASS = """

class Sparse{name}(Sparse, {name}):
    config_class = Sparse{config}
"""
_NEEDS_MOEIFY = '''"""Sparse{architecture}: {architecture} of transformers with sparse layers for dense networks.

Written by moeify {version}, whose layers it needs:

    {auto}.from_pretrained(folder, trust_remote_code=True)
"""

from transformers import {imported}

try:
    from moeify.store.modelling import sparse_class, sparse_config_class
except ImportError:
    raise ImportError(
        "the sparse layers of this model are more than top-k mixtures of feed-forward networks, so it needs moeify: "
        "pip install moeify"
    ) from None

Sparse{config} = sparse_config_class({config})
{classes}'''
_CLASS_OF_MOEIFY = "Sparse{name} = sparse_class({name}, Sparse{config})\n"
