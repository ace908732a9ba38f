"""Weights of a model with PEFT adapters: the adapters as PEFT writes them, and beside them all else that is trained.

adapter_model.safetensors, adapter_config.json    what PEFT and transformers load over the base model
trained.safetensors                               other trained parameters, and the buffers, of the base model
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.files import read_tensors, share_tensors, write_tensors
from moeify.store.dtypes import fits

WEIGHTS = "adapter_model.safetensors"
OTHERS = "trained.safetensors"


def saves_adapters(model: nn.Module) -> bool:
    """Whether a model is a `PeftModel`; looks at nothing if PEFT was never imported."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters, and all other tensors of the model that training changes."""
    write_adapters(model, folder)
    inside = {tensor.data_ptr() for name in _folders(model, folder) for tensor in _adapter(model, name).values()}
    others = {name: tensor for name, tensor in _trained(model).items() if tensor.data_ptr() not in inside}
    write_tensors(folder / OTHERS, others)


def write_adapters(model: Any, folder: Path) -> None:
    """Write the adapters as PEFT does, for all who may read a new file."""
    model.save_pretrained(folder)
    for place in _folders(model, folder).values():
        share_tensors(place)


def load_adapters(model: Any, folder: Path) -> None:
    """Read back what `save_adapters` wrote, into a model with the same adapters over the same base.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, or one of other adapters; nothing was assigned.
    """
    from peft import set_peft_model_state_dict

    folders, others = _folders(model, folder), read_tensors(folder / OTHERS)
    own = _trained(model)
    loaded = {name: read_tensors(place / WEIGHTS) for name, place in folders.items()}
    for name, tensors in loaded.items():
        _require_same(_adapter(model, name), tensors, folders[name] / WEIGHTS)
    _require_same({name: own.get(name) for name in others}, others, folder / OTHERS)
    for name, tensors in loaded.items():
        set_peft_model_state_dict(model, tensors, adapter_name=name)
    with torch.no_grad():
        for name, tensor in others.items():
            own[name].copy_(tensor)


def _folders(model: Any, folder: Path) -> dict[str, Path]:
    """The folder of each adapter, by its name."""
    return {name: folder if name == "default" else folder / name for name in model.peft_config}


def _adapter(model: Any, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under the names of PEFT's files."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=name)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {n: t.detach() for n, t in state.items() if isinstance(t, Tensor) and (t.requires_grad or not _is_weight(t))}


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _require_same(own: dict[str, Any], loaded: dict[str, Tensor], file: Path) -> None:
    wrong = sorted(own.keys() ^ loaded.keys()) + [
        name
        for name, tensor in sorted(loaded.items())  # files of safetensors have no order
        if name in own
        and (own[name] is None or own[name].shape != tensor.shape or not fits(own[name].dtype, tensor.dtype))
    ]
    if wrong:
        raise ValueError(
            f"{file} does not fit the adapters of this model: {', '.join(wrong[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; make the model with the same get_peft_model"
        )
