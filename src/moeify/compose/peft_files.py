"""Read and write LoRA adapters as PEFT does, without PEFT: `adapter_config.json`, `adapter_model.safetensors`."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moeify import patterns
from moeify.compose.adapter_gates import FILE as GATES
from moeify.compose.adapter_gates import load_gates
from moeify.files import read_json, read_tensors, write_json, write_tensors
from moeify.folders import finish
from moeify.store.dtypes import REAL
from moeify.store.hashes import check, saving

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)[^.]+)?\.weight")

_BASE = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")


@dataclass(frozen=True)
class LowRank:
    """The low-rank update that an adapter adds to the weight of one linear layer: `s · B A`.

    Attributes:
        A: the down-projection, `lora_A`.
        B: the up-projection, `lora_B`.
        scale: s; alpha / r, or alpha / sqrt(r) of a rank-stabilised adapter.
    """

    A: Float[Tensor, "r D"]
    B: Float[Tensor, "O r"]
    scale: float

    @property
    def rank(self) -> int:
        """r, the rank."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        modules: the low-rank update of each linear layer, by the name of the layer in the base model.
        gates: PHATGOOSE's gate vector of each linear layer, by the same names; often empty.
        base: weights of the base model in the same file, by the same names: PEFT stores the weight of an adapted
            `lm_head`.
    """

    modules: dict[str, LowRank]
    gates: dict[str, Float[Tensor, "D"]] = field(default_factory=dict)
    base: dict[str, Float[Tensor, "O D"]] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> Adapter:
    """Read what PEFT's `save_pretrained` wrote, and `gates.safetensors` if it is in the same folder.

    What `write_adapter` wrote is compared with its hashes; files of PEFT have none.

    Raises:
        FileNotFoundError: a file is missing, or the weights are there as a pickle only.
        ValueError: damaged files; an adapter that is not plain LoRA of linear layers. The message names the remedy.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    finish(folder.parent)  # of a library
    finish(folder)
    check(folder)
    config = _read_config(folder)
    _refuse_settings(folder, config)
    sides: dict[str, dict[str, Tensor]] = {}
    tensors = _read_weights(folder)
    base = {found["module"]: tensors.pop(name) for name in list(tensors) if (found := _BASE.fullmatch(name))}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None or tensor.dim() != 2:
            raise ValueError(f"{folder} has a tensor {name} of shape {tuple(tensor.shape)}: {_meaning(name)}")
        if tensor.dtype not in REAL:
            raise ValueError(f"{folder / _WEIGHTS} has {name} in {tensor.dtype}, which are not weights of a LoRA")
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    modules = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = ", ".join(f"lora_{side} {tuple(tensor.shape)}" for side, tensor in pair.items())
            raise ValueError(f"{folder}: {module} has {shapes}; lora_A must be (r, D) and lora_B (O, r)")
        modules[module] = LowRank(pair["A"], pair["B"], _scale(folder, config, module, pair["A"].shape[0]))
    gates = load_gates(folder) if os.path.lexists(folder / GATES) else {}
    gates = {name.removeprefix("base_model.model."): gate for name, gate in gates.items()}
    return Adapter(modules, gates, {module: weight for module, weight in base.items() if module in modules})


def write_adapter(adapter: Adapter, folder: str | Path, *, targets: list[str], transposed: bool, base: str) -> None:
    """Write an adapter so that PEFT reads it, with its gates and hashes.

    Args:
        adapter: what to write.
        folder: created if missing; an adapter in it is replaced atomically.
        targets: the names, or ends of names, that mean exactly its linear layers in the base model.
        transposed: whether these are transformers' Conv1D.
        base: the name of the base model, "" if it has none.

    Raises:
        OSError: the disk is full, the folder cannot be written to, or another process is saving into it.
    """
    with saving(folder) as stage:
        write_files(adapter, stage.new, targets=targets, transposed=transposed, base=base)
        stage.obsolete.add(GATES)


def write_files(adapter: Adapter, folder: Path, *, targets: list[str], transposed: bool, base: str) -> None:
    """Write the files of `write_adapter` except the hashes, into a folder that is not read yet."""
    ranks = {module: low.rank for module, low in adapter.modules.items()}
    alphas = {module: _integer_if_whole(low.scale * low.rank) for module, low in adapter.modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "rank_pattern": {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(module)}": a for module, a in alphas.items() if a != alpha},
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_json(folder / _CONFIG, config)
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": getattr(low, side)
        for module, low in adapter.modules.items()
        for side in ("A", "B")
    }
    write_tensors(folder / _WEIGHTS, tensors)
    if adapter.gates:
        write_tensors(folder / GATES, adapter.gates)


def _integer_if_whole(alpha: float) -> float | int:
    return round(alpha) if alpha == round(alpha) else alpha


def _scale(folder: Path, config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r): what PEFT multiplies by; a pattern may give a layer values of its own."""
    stated, alpha = (
        next((value for pattern, value in given.items() if _matches(pattern, module)), config[key])
        for key, given in (
            ("r", config.get("rank_pattern") or {}),
            ("lora_alpha", config.get("alpha_pattern") or {}),
        )
    )
    if stated != rank:
        raise ValueError(
            f"{folder}: {module} has rank {rank} in {_WEIGHTS} and {stated} in {_CONFIG}, so its scale is not known"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT gives a layer the value of a pattern."""
    return patterns.search(rf"^(.*\.)?({pattern})$", module)


_PLAIN = "train a plain LoRA, or merge it into the base with PEFT's merge_and_unload()"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("use_dora", bool, f"DoRA rescales the weight, which no sum of products does; {_PLAIN}"),
    ("bias", lambda bias: bias not in (None, "none"), f"it changes the base's biases too; {_PLAIN} with bias='none'"),
    ("lora_bias", bool, f"its projections have biases; {_PLAIN}"),
    ("modules_to_save", bool, f"it replaces whole modules of the base, which no two adapters can share; {_PLAIN}"),
    ("trainable_token_indices", bool, f"it changes embeddings; {_PLAIN}"),
    ("target_parameters", bool, f"it adapts parameters that are not linear layers; {_PLAIN}"),
    ("layer_replication", bool, "it repeats layers of the base; repeat them in the base before"),
    ("alora_invocation_tokens", bool, f"it acts from certain tokens on; {_PLAIN}"),
    *((key, bool, f"it is not computed as s · B A x; {_PLAIN}") for key in ("use_qalora", "use_bdlora", "kasa_config")),
    (
        "init_lora_weights",
        lambda start: isinstance(start, str) and start.startswith(_CHANGES_BASE),
        "such a start changes the base's weights; save it with PEFT's path_initial_model_for_weight_conversion=...",
    ),
)  # fmt: skip


def _refuse_settings(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} holds an adapter of type {config.get('peft_type')}; "
            "only LORA can be experts beside a linear layer"
        )
    for key, refused, reason in _REFUSED:
        if refused(config.get(key)):
            raise ValueError(f"{folder} cannot be an expert ({key}={config[key]!r}): {reason}")


def _meaning(name: str) -> str:
    if "lora_embedding" in name:
        return f"it adapts an embedding, which is not a linear layer; {_PLAIN}"
    if "magnitude" in name:
        return f"DoRA rescales the weight, which no sum of products does; {_PLAIN}"
    return f"it is not one of a LoRA beside a linear layer; {_PLAIN}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no {_CONFIG} in {folder}: it is not the folder of a PEFT adapter")
    config: dict[str, Any] = {"r": 8, "lora_alpha": 8} | read_json(path)  # PEFT's defaults
    numbers = [(key, config[key]) for key in ("r", "lora_alpha")]
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{path} has {key}={config[key]!r}, which is not a mapping from patterns to numbers")
        numbers += (config.get(key) or {}).items()
    for key, value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path} has {key}={value!r}, which must be a number")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    if os.path.lexists(path):
        return read_tensors(path)
    if (folder / _PICKLE).is_file():
        raise FileNotFoundError(
            f"{folder} has its weights in {_PICKLE}, a pickle, which may run code when it is read; if you trust it, "
            "load it with PEFT and write it again with save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"there is no {_WEIGHTS} in {folder}")
