"""What SGLang's transformers backend reads of a saved model, by its own code, where SGLang is installed."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from moeify import Recipe, export, save, sparsify
from moeify.files import read_tensors
from moeify.sparsify.make import fresh
from tiny_models import causal_lm

LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def read():
    """Which tensors of a layer's experts SGLang's loader takes, given their names."""
    if (found := importlib.util.find_spec("sglang")) is None:
        pytest.skip("sglang is not installed")
    root = Path(next(iter(found.submodule_search_locations))) / "srt"
    load = method(root / "models" / "transformers.py", "TransformersFusedMoE", "load_weights")
    of_names = method(
        root / "layers" / "moe" / "fused_moe_triton" / "layer.py", "FusedMoE", "make_expert_params_mapping"
    )
    mapping = [
        (ours, theirs.removeprefix("experts."), expert, shard)
        for gate, down, up in (("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"))
        for ours, theirs, expert, shard in of_names(None, gate, down, up, 4)
    ]
    parameters = {f"experts.{name}": mock.Mock() for name in ("w13_weight", "w2_weight")}
    experts = SimpleNamespace(named_parameters=parameters.items, _expert_mapping=mapping, layer_name="experts")
    return lambda names: load(experts, [(name, None) for name in names])


def method(file: Path, owner: str, name: str):
    """A method of a class, compiled apart from its module, whose other imports need a GPU."""
    (body,) = (node.body for node in ast.parse(file.read_text()).body if getattr(node, "name", None) == owner)
    (found,) = (node for node in body if getattr(node, "name", None) == name)
    found.decorator_list = []
    module = {"Iterable": Iterable, "torch": torch, "default_weight_loader": mock.Mock(), "List": list, "Tuple": tuple}
    module |= {"logger": mock.Mock()}
    exec(compile(ast.Module([found], []), str(file), "exec"), module)
    return module[name]


def names_of_experts(folder: Path, layer: str) -> list[str]:
    names = (name for name in read_tensors(folder / "model.safetensors") if name.startswith(layer))
    return [name.partition("experts.")[2] for name in names if "experts." in name]


def test_sglang_skips_the_experts_of_a_saved_folder_and_reads_those_of_an_exported_one(read, tmp_path):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, experts=fresh), verbose=False).eval()
    save(model, tmp_path / "saved")
    assert names_of_experts(tmp_path / "saved", LAYER)
    assert not read(names_of_experts(tmp_path / "saved", LAYER))
    export.write(model, tmp_path / "exported")
    exported = names_of_experts(tmp_path / "exported", LAYER)
    assert len(exported) == 12
    assert read(exported) == set(exported)
