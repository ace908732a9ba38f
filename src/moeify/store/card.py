"""`README.md`, the card of a saved model: YAML for the Hub, how it was made sparse, its costs and how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moeify.files import fingerprint, hashes_of
from moeify.flops import count
from moeify.layers import moe_layers
from moeify.version import __version__

NAME = "README.md"
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}


def is_own(folder: Path) -> bool:
    """Whether a folder has no model card, or one that is unchanged since `save` wrote it, which may be replaced."""
    path = folder / NAME
    try:
        return not path.exists() or (hashes_of(folder) or {}).get(NAME) == fingerprint(path)
    except (ValueError, OSError):  # the hashes are damaged, or the path is not a file
        return False


def card(model: nn.Module, description: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """The model card of a sparse model of transformers.

    Args:
        model: the model.
        description: the config of the model.
        notes: additional table rows by title, such as `Data` and `Balance`.
    """
    auto = next((auto for auto in description["auto_map"] if auto in _TASKS or "LM" in auto), "AutoModel")
    rows = {
        **_sizes(model),
        "Recipe": f"`{json.dumps(description['recipe'])}`",
        "Data": "not recorded",
        "Balance": "not recorded",
        "Licence": _licence(model) or "not known; that of the dense model holds",
        **notes,
    }
    table = "\n".join(f"| {title} | {str(value).replace('|', chr(92) + '|')} |" for title, value in rows.items())
    head = "\n".join(_head(model, _TASKS.get(auto)))
    name, dense = description["architectures"][0], description["model"]["class"].removeprefix("transformers.")
    needs = "needs torch and transformers only" if description["sparse_layers"] else "needs `pip install moeify`"
    return _CARD.format(
        head=head, name=name, dense=dense, layers=len(moe_layers(model)), version=__version__, auto=auto, needs=needs,
        table=table,
    )  # fmt: skip


def _sizes(model: nn.Module) -> dict[str, str]:
    costs = count(model)
    return {
        "Parameters": f"{costs.parameters:,}",
        "Active parameters per token": f"{costs.active_parameters:,}",
        "Forward FLOPs per token": f"{costs.flops:,}, and {costs.dense_flops:,} if every expert ran",
    }


def _head(model: Any, task: str | None) -> Iterator[str]:
    yield "library_name: transformers"
    if task is not None:
        yield f"pipeline_tag: {task}"
    yield "tags:\n- moeify\n- mixture-of-experts"
    base = _base(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        yield f"base_model: {base}"
    if licence := _licence(model):
        yield f"license: {licence}"


def _base(model: Any) -> str:
    """The folder or the Hub name that the dense model was loaded from, '' if it was built from a config."""
    return str(getattr(model.config, "_name_or_path", "") or "")


def _licence(model: Any) -> str | None:
    """The licence in the model card of the dense model, None if the card is not on this machine or has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    base = _base(model)
    path: Any = Path(base) / NAME
    try:
        path = path if not base or path.is_file() else try_to_load_from_cache(base, NAME)
        text = Path(path).read_text(encoding="utf-8") if base and isinstance(path, str | Path) else ""
    except (HFValidationError, OSError, ValueError):
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.-]+)\s*$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


_CARD = """---
{head}
---

# {name}

A `{dense}` of transformers in which {layers} layers are mixtures of experts, made by moeify {version}.

```python
from transformers import {auto}

model = {auto}.from_pretrained(folder, trust_remote_code=True)
```

That {needs}. After `import moeify` the layers are those of moeify, and
`trust_remote_code` is not needed; `moeify.load(folder)` opens the model as well.

| | |
|---|---|
{table}
"""
