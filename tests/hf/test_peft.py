"""LoRA on stacked experts through PEFT's `target_parameters`, on models of transformers and on sparse layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainingArguments

from moeify import MoE, Recipe, record, sparsify
from moeify.flops import count
from moeify.layers import sparse_layers
from moeify.routers import Compete, DefaultVector, MoLE
from moeify.routers.base import begin_step
from moeify.sparsify import fresh
from moeify.train import SparseArguments, SparseTrainer
from moeify.train.calibrate import calibrate_all_experts, tokens_per_expert
from tiny_models import SPARSE, causal_lm, inputs, tokens

ADAPTED = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(model: PreTrainedModel) -> PeftModel:
    """With adapters on the experts whose B is not zero."""
    model = get_peft_model(model, LoraConfig(target_parameters=ADAPTED, r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("family", SPARSE)
def test_decisions_are_seen_through_adapters(family: str):
    model = SPARSE[family]()
    first = next(iter(sparse_layers(model)))
    with record(model) as before:
        model(**inputs(model))
    peft = adapted(model)
    with record(peft) as after:
        peft(**inputs(model))
    assert list(after) == [f"base_model.model.{name}" for name in before]
    assert torch.equal(after[f"base_model.model.{first}"].counts, before[first].counts)
    reached = tokens_per_expert(peft, [tokens()]).layers
    assert torch.equal(reached[f"base_model.model.{first}"], before[first].counts)
    with calibrate_all_experts(peft):
        peft(**inputs(model))


@pytest.mark.parametrize("family", SPARSE)
def test_adapters_of_experts_are_active_for_the_share_of_tokens_that_reach_them(family: str):
    model = SPARSE[family]()
    before = count(model)
    layer = next(iter(sparse_layers(model).values()))
    after = count(adapted(model))
    added = after.parameters - before.parameters
    assert added > 0
    share = layer.rows_per_token() / layer.num_experts
    assert after.active_parameters - before.active_parameters == round(added * share)


@pytest.mark.parametrize("family", SPARSE)
def test_adapters_of_experts_are_trained_saved_and_loaded(family: str, tmp_path):
    model = adapted(SPARSE[family]())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    data = [{"input_ids": row, "labels": row} for row in tokens(4).tolist()]
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(tmp_path, **small, disable_tqdm=True, learning_rate=1e-2)
    SparseTrainer(model, arguments, train_dataset=data, sparse=SparseArguments(balance=0)).train()
    assert before
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(SPARSE[family](), tmp_path / "adapter").eval()
    with torch.no_grad():
        given = inputs(model)
        torch.testing.assert_close(loaded(**given).logits, model.eval()(**given).logits)


def test_a_sparse_layer_runs_adapters_of_its_experts():
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, experts=fresh), verbose=False)
    names = [name for name, part in model.named_modules() if isinstance(part, MoE)]
    plain = model(**inputs(model)).logits
    peft = adapted(model)
    with record(peft) as decisions:
        changed = peft(**inputs(model))
    assert list(decisions) == [f"base_model.model.{name}" for name in names]
    changed.loss.backward()
    assert all(p.grad is not None for name, p in peft.named_parameters() if "lora_A" in name)
    assert (changed.logits - plain).abs().max() > 1e-3
    merged = peft.merge_and_unload()
    torch.testing.assert_close(merged(**inputs(model)).logits, changed.logits, atol=1e-4, rtol=1e-4)


def test_a_named_backend_does_not_pass_adapters_by():
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, experts=fresh), verbose=False)
    for part in model.modules():
        if isinstance(part, MoE):
            part.backend = "cpp"
    with pytest.raises(ValueError, match="backend 'cpp' cannot run this layer"), torch.no_grad():
        adapted(model)(**inputs(model))


@pytest.mark.parametrize("holder", [partial(Compete, rate=1, most=9), DefaultVector, MoLE])
def test_a_router_that_runs_experts_runs_their_adapters(holder):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, router=holder, experts=fresh), verbose=False)
    begin_step(model, 0)
    plain = model(**inputs(model)).logits
    peft = adapted(model)
    changed = peft(**inputs(model))
    assert (changed.logits - plain).abs().max() > 1e-3
    changed.loss.backward()
    assert all(p.grad is not None for name, p in peft.named_parameters() if "lora_A" in name)
    torch.testing.assert_close(peft.unload()(**inputs(model)).logits, plain)
