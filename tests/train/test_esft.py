"""Of a sparse model only the chosen experts learn, and only they have optimizer states; files stay as they were."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from moeify import MoE, Recipe, sparsify
from moeify.experts import Each
from moeify.flops import count
from moeify.layers import sparse_layers
from moeify.routers import TopK
from moeify.sparsify import fresh
from moeify.store import load, save
from moeify.train import SparseArguments, SparseTrainer, expert_relevance, join_experts, train_experts, trainable
from moeify.train.esft import lora_experts
from tiny_models import causal_lm, deepseek_v3, gpt_oss, mixtral, olmoe, tokens


def ours():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4, experts=fresh), verbose=False)


MODELS = {"ours": ours, "mixtral": mixtral, "olmoe": olmoe, "deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss}
families = pytest.mark.parametrize("family", MODELS)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    """Which experts of which tensors differ."""
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    return {
        name: [e for e, rows in enumerate(before[name]) if not torch.equal(rows, after[name][e])] for name in differ
    }


def learn(model, steps=3):
    ids = tokens(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def stacks(model, chosen):
    """The tensors of the experts, and which of their experts should learn."""
    layers = sparse_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(layer.experts)]}.{key}": sorted(chosen[name])
        for name, layer in layers.items()
        for key, parameter in layer.experts.named_parameters()
        if len(parameter) == layer.num_experts
    }


@families
def test_only_the_chosen_experts_change_and_have_optimizer_states(family):
    model = MODELS[family]()
    chosen = expert_relevance(model, [tokens(4)]).choose(0.4)
    expected, before = stacks(model, chosen), copied(model)
    table = train_experts(model, chosen, verbose=False)
    optimizer = learn(model)
    assert changed(before, model.state_dict()) == expected
    of_chosen = sum(before[name][experts].numel() for name, experts in expected.items())
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == of_chosen
    assert table["experts"].trained == table.total.trained == of_chosen
    assert table["experts"].parameters == sum(before[name].numel() for name in expected)


@families
def test_slices_are_counted_with_their_stack_and_not_again(family):
    model = MODELS[family]()
    before = count(model, tokens=16)
    train_experts(model, expert_relevance(model, [tokens(4)]).choose(0.4), verbose=False)
    assert count(model, tokens=16) == before


def test_gradients_are_those_of_the_whole_stack():
    model, whole, ids = mixtral(), mixtral(), tokens(4)
    train_experts(model, {"model.layers.1.mlp": [2, 0]}, verbose=False)
    for each in (model, whole):
        each(input_ids=ids, labels=ids).loss.backward()
    parts = model.model.layers[1].mlp.experts.parametrizations
    for name in ("gate_up_proj", "down_proj"):
        gradient = getattr(whole.model.layers[1].mlp.experts, name).grad
        assert torch.equal(parts[name].original1.grad, gradient[2])
        assert torch.equal(parts[name].original2.grad, gradient[0])
        assert parts[name].original0.grad is None


def test_experts_that_are_modules_are_chosen_whole():
    layer = MoE(TopK(8, 3), Each([nn.Linear(8, 8) for _ in range(3)]))
    train_experts(layer, {"": [1]}, verbose=False)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "experts.experts.1.weight",
        "experts.experts.1.bias",
    ]


def test_a_model_is_saved_copied_cast_and_joined_as_if_nothing_had_happened(tmp_path):
    ids = tokens(2)
    for model, folder, read in (
        (mixtral(), tmp_path / "hf", AutoModelForCausalLM.from_pretrained),
        (ours(), tmp_path / "ours", load),
    ):
        names, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
        chosen = {"model.layers.0.mlp": [1, 3], "model.layers.1.mlp": []}
        learning = {name: experts for name, experts in stacks(model, chosen).items() if experts}
        train_experts(model, chosen, verbose=False)
        learn(model.train())
        expected = model.eval()(input_ids=ids).logits
        assert list(model.state_dict()) == names
        save(model, folder) if folder.name == "ours" else model.save_pretrained(folder)
        assert torch.equal(read(folder).eval()(input_ids=ids).logits, expected)
        again = copy.deepcopy(model)
        before = copied(again)
        learn(again)
        assert changed(before, again.state_dict()) == learning
        assert torch.equal(model(input_ids=ids).logits, expected)
        join_experts(model)
        assert sorted(name for name, _ in model.named_parameters()) == sorted(parameters)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert trainable(model).total.trained == 0


def test_slices_follow_the_stack_to_another_dtype():
    model, chosen = ours(), {"model.layers.0.mlp": [1], "model.layers.1.mlp": [3, 0]}
    expected = stacks(model, chosen)
    train_experts(model, chosen, verbose=False)
    before = copied(model.double())
    learn(model)
    assert changed(before, model.state_dict()) == expected


def trained(make, folder, steps, resume=None):
    model = mixtral().train()
    train_experts(model, {"model.layers.1.mlp": [3]}, verbose=False)
    settings = {"max_steps": steps, "save_steps": 2, "lr_scheduler_type": "constant", "learning_rate": 2e-2}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    make(model=model, args=TrainingArguments(folder, **settings), train_dataset=data).train(resume)
    return copied(model)


def test_trainers_train_clip_and_resume_chosen_experts(tmp_path):
    sparse = partial(SparseTrainer, sparse=SparseArguments(balance=0))
    expected = {f"model.layers.1.mlp.experts.{name}": [3] for name in ("gate_up_proj", "down_proj")}
    whole, before = trained(sparse, tmp_path / "whole", 4), copied(mixtral())
    assert changed(before, whole) == changed(before, trained(Trainer, tmp_path / "theirs", 2)) == expected
    trained(sparse, tmp_path / "parts", 2)
    resumed = trained(sparse, tmp_path / "parts", 4, resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert changed(whole, resumed) == {}


def test_what_cannot_be_chosen_is_refused_and_nothing_frozen():
    model = mixtral()
    for chosen, reason in (
        ({"model.layers.7.mlp": [0]}, "has no sparse layer 'model.layers.7.mlp'"),
        ({"model.layers.0.mlp": [4]}, "experts 0 to 3"),
        ({"model.layers.0.mlp": [1, 1]}, "at most once"),
        ({"model.layers.0.mlp": []}, "no expert was chosen"),
    ):
        with pytest.raises(ValueError, match=reason):
            train_experts(model, chosen, verbose=False)
    assert all(p.requires_grad for p in model.parameters())
    train_experts(model, {"model.layers.0.mlp": [1]}, verbose=False)
    with pytest.raises(ValueError, match="call join_experts"):
        train_experts(model, {"model.layers.0.mlp": [2]}, verbose=False)


@families
def test_lora_of_chosen_experts_is_written_and_read_by_peft(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, base, ids = MODELS[family](), MODELS[family](), tokens(2)
    chosen = expert_relevance(model, [ids]).choose(0.4)
    expected = {name: experts for name, experts in stacks(model, chosen).items() if not name.endswith("bias")}
    before = copied(base)
    adapted = lora_experts(model, chosen, rank=2)
    optimizer = learn(adapted)
    rows = sum(2 * sum(before[name].shape[1:]) * len(experts) for name, experts in expected.items())
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == rows
    adapted.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(read(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert changed(before, read.merge_and_unload().state_dict()) == expected


def test_switch_transformers_whose_experts_are_modules():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_heads": 4}
    config = SwitchTransformersConfig(
        vocab_size=64, num_experts=4, num_decoder_layers=2, num_sparse_decoder_layers=1, **sizes
    )
    model = SwitchTransformersForConditionalGeneration(config)
    name = next(iter(sparse_layers(model)))
    train_experts(model, {name: [2]}, verbose=False)
    assert {n.split("expert_")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"2"}


@families
def test_fused_optimizers_change_the_chosen_experts_alone(family):
    pytest.importorskip("peft")
    model, base, ids = MODELS[family](), MODELS[family](), tokens(2)
    chosen = expert_relevance(model, [ids]).choose(0.4)
    expected = {name: experts for name, experts in stacks(model, chosen).items() if not name.endswith("bias")}
    adapted = lora_experts(model, chosen, rank=2)
    learning = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.1, fused=True)
    for _ in range(2):  # of two forward passes and one backward, as of DPO
        loss = adapted(input_ids=ids, labels=ids).loss + adapted(input_ids=ids + 1, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    assert changed(copied(base), merged.state_dict()) == expected
    torch.testing.assert_close(merged(input_ids=ids).logits, logits)
