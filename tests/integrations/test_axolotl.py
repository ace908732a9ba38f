"""The plugin as Axolotl's own PluginManager calls it, and its keys in Axolotl's configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from transformers import TrainingArguments

from moeify.balance import Sign
from moeify.layers import sparse_layers
from moeify.store import load
from moeify.train import BalanceCallback, RoutingCallback
from tiny_models import VOCABULARY, causal_lm, mixtral

base = pytest.importorskip("axolotl.integrations.base", reason="it needs Axolotl: pip install --no-deps axolotl")
PLUGIN = "moeify.integrations.axolotl.Moeify"
PAGE = Path(__file__).parents[2] / "docs" / "guide" / "trainers.md"


@pytest.fixture
def manager(monkeypatch):
    monkeypatch.setattr(base.PluginManager, "_instance", None)
    manager = base.PluginManager.get_instance()
    manager.register(PLUGIN)
    return manager


def settings(folder, **keys):
    from axolotl.utils.dict import DictDefault

    return DictDefault({"plugins": [PLUGIN], "output_dir": str(folder), **keys})


def trainer(model, folder):
    ids = torch.randint(3, VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def test_a_dense_model_becomes_sparse_balanced_saved_and_reported(tmp_path, manager):
    controller = {"name": "sign", "rate": 0.001}
    keys = settings(tmp_path, moe_recipe="matched", moe_balance=0.02, moe_controller=controller, moe_report=True)
    model = causal_lm("llama")
    manager.post_model_build(keys, model)
    assert len(sparse_layers(model)) == 2
    run = trainer(model, tmp_path)
    for callback in manager.add_callbacks_post_trainer(keys, run):
        run.add_callback(callback)
    run.train()
    assert "max_vio" in run.state.log_history[0]
    assert model.model.layers[0].mlp.router.selection_bias.abs().max() > 0
    manager.post_train(keys, model)
    assert (tmp_path / "inspect.html").stat().st_size > 10_000
    ids = torch.arange(3, 11).view(1, 8)
    assert torch.allclose(load(tmp_path).eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_keys_become_callbacks_and_a_sparse_model_is_left_as_it_is(tmp_path, manager):
    model = mixtral()
    manager.post_model_build(settings(tmp_path, moe_recipe="mixtral"), model)
    assert type(model).__name__ == "MixtralForCausalLM"

    def made(**keys):
        return manager.add_callbacks_post_trainer(settings(tmp_path, **keys), trainer(model, tmp_path))

    (callback,) = made()
    assert callback.sparse.balance == 0.01
    weights = {"balance": 0.1, "z": 1e-3, "scope": "sequence"}
    (callback,) = made(moe_balance=weights, moe_controller={"name": "sign", "rate": 0.01})
    assert isinstance(callback, BalanceCallback)
    assert (callback.sparse.scope, callback.sparse.z, callback.sparse.controller) == ("sequence", 1e-3, Sign(0.01))
    (callback,) = made(moe_balance=0, moe_report=True)
    assert isinstance(callback, RoutingCallback)


def test_an_adapter_on_routers_that_no_file_holds_is_refused(tmp_path, manager):
    with pytest.raises(ValueError, match="adapter: lora would be trained on routers that no file holds"):
        manager.post_model_build(settings(tmp_path, moe_recipe="mixtral", adapter="lora"), causal_lm("llama"))


def test_axolotls_schema_takes_the_configuration_of_the_docs_and_refuses_wrong_types(manager):
    from axolotl.integrations.config import merge_input_args

    block = re.search(r"(?:^    .*\n)*^    moe_recipe.*\n(?:^    .*\n)*", PAGE.read_text("utf-8"), re.MULTILINE)
    keys = yaml.safe_load(block.group())
    assert manager.get_input_args() == ["moeify.integrations.axolotl.MoeifyArgs"]
    schema, _ = merge_input_args()
    known = schema.model_fields
    assert {name for name in keys if name.startswith("moe_")} <= known.keys()
    from moeify.integrations.axolotl import MoeifyArgs

    MoeifyArgs(**keys)
    with pytest.raises(ValueError, match="moe_report"):
        MoeifyArgs(moe_report="sometimes")
