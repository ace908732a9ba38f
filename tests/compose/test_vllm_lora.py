"""vLLM's own reader of adapters gives the products B A of what moeify writes, where vLLM is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from adapter_folders import library, make_adapter
from moeify import Recipe, save_adapters, sparsify
from moeify.compose.peft_files import Adapter, LowRank, read_adapter, write_adapter
from moeify.find import linears
from moeify.sparsify import frozen, lora
from tiny_models import TINY

STUBS = (
    "vllm", "vllm.config.lora", "vllm.logger", "vllm.lora.layers", "vllm.model_executor.custom_op",
    "vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.linear", "vllm.model_executor.utils",
    "vllm.model_executor.layers.vocab_parallel_embedding", "vllm.model_executor.models.utils",
    "vllm.transformers_utils.repo_utils", "vllm.utils.torch_utils",
)  # fmt: skip


@pytest.fixture(scope="module")
def read():
    """vLLM's reader: an adapter folder and the modules that may have adapters, to its weights by module."""
    if (found := importlib.util.find_spec("vllm")) is None:
        pytest.skip("vllm is not installed")
    pytest.importorskip("regex")
    root = Path(next(iter(found.submodule_search_locations)))
    stubs = {name: mock.MagicMock() for name in STUBS}
    stubs["vllm.utils.torch_utils"].PIN_MEMORY = False
    modules = {}
    with mock.patch.dict(sys.modules, stubs):
        for name in ("peft_helper", "lora_weights", "utils", "lora_model"):
            spec = importlib.util.spec_from_file_location(f"vllm.lora.{name}", root / "lora" / f"{name}.py")
            sys.modules[spec.name] = modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])

        def loras(folder, targets):
            helper = modules["peft_helper"].PEFTHelper.from_local_dir(str(folder), None)
            helper.validate_legal(mock.MagicMock(max_lora_rank=64))
            options = {"lora_model_id": 1, "device": "cpu"}
            model = modules["lora_model"].LoRAModel.from_local_checkpoint(str(folder), set(targets), helper, **options)
            return model.loras

        yield loras


def same_products(loras, adapter):
    assert loras.keys() == adapter.modules.keys()
    for name, low in adapter.modules.items():
        found = loras[name].optimize()
        torch.testing.assert_close(found.lora_b @ found.lora_a, low.scale * low.B @ low.A)


def test_adapters_of_a_library_are_read_one_by_one(read, tmp_path):
    folders = {name: make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("law", "verse"))}
    save_adapters(library(folders), tmp_path / "library")
    for name, folder in folders.items():
        same_products(read(tmp_path / "library" / name, ["q_proj", "v_proj"]), read_adapter(folder))


def test_lora_experts_are_read_as_adapters(read, tmp_path):
    recipe = Recipe(where=linears(r"q_proj|v_proj"), num_experts=2, experts=lora, shared=frozen)
    model = sparsify(TINY["llama"](), recipe, verbose=False)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_()
    save_adapters(model, tmp_path / "library")
    experts = [path.parent for path in sorted((tmp_path / "library").glob("*/adapter_config.json"))]
    assert len(experts) == 2
    for folder in experts:
        same_products(read(folder, ["q_proj", "v_proj"]), read_adapter(folder))
    with pytest.raises(ValueError, match="expected target modules"):
        read(experts[0], ["q_proj"])


def test_every_layer_has_its_own_rank_and_scale(read, tmp_path):
    sizes = {"model.layers.0.self_attn.q_proj": (2, 0.5), "model.layers.1.self_attn.q_proj": (4, 3.0)}
    low = {name: LowRank(torch.randn(rank, 32), torch.randn(32, rank), scale) for name, (rank, scale) in sizes.items()}
    write_adapter(Adapter(low), tmp_path / "one", targets=["q_proj"], transposed=False, base="")
    same_products(read(tmp_path / "one", ["q_proj"]), read_adapter(tmp_path / "one"))
