"""A run that trains PEFT adapters leaves what PEFT opens, and goes on from it bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from moeify import Recipe, load, save, sparsify
from moeify.balance import Sign
from moeify.train import SparseArguments, SparseTrainer
from tiny_models import VOCABULARY, causal_lm, deepseek_v3, mixtral

IDS = torch.randint(3, VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(0))


def ours():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


def hf_model():
    torch.manual_seed(0)
    return mixtral()


def adapted(base, modules=("q_proj", "v_proj")):
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(target_modules=list(modules), r=2))


def train(folder, model, steps, resume=None, **sparse):
    settings = {"max_steps": steps, "save_steps": 1, "logging_steps": 1, "learning_rate": 1e-2, "report_to": []}
    arguments = TrainingArguments(folder, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, **settings)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    run = SparseTrainer(model, arguments, train_dataset=data, sparse=SparseArguments(balance=0, **sparse))
    run.train(resume_from_checkpoint=resume)
    return run


def interrupted(folder, build, **sparse):
    """A run of four steps that was killed after the second, and then went on."""
    train(folder, build(), 4, **sparse)
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return train(folder, build(), 4, resume=True, **sparse)


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS[:1]).logits


@pytest.mark.parametrize("build", [ours, hf_model])
def test_peft_opens_the_checkpoint_over_the_same_base(tmp_path, build):
    run = train(tmp_path, adapted(build()), 2)
    assert logits(run.model).ne(logits(build())).any()
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "checkpoint-2")), logits(run.model))
    run.save_model(tmp_path / "final")
    assert torch.equal(logits(PeftModel.from_pretrained(build(), tmp_path / "final")), logits(run.model))
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob("*.pt"))
    assert readable_as_new(tmp_path)


def readable_as_new(folder):
    """Whether every file has the permissions of a new one."""
    (folder / "new").touch()
    return len({file.stat().st_mode for file in folder.rglob("*") if file.is_file()}) == 1


def test_a_finished_model_without_adapters_can_be_read_as_a_new_file(tmp_path):
    train(tmp_path, hf_model(), 1).save_model(tmp_path / "final")
    assert readable_as_new(tmp_path)


@pytest.mark.parametrize("build", [ours, hf_model])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, build):
    whole = train(tmp_path / "whole", adapted(build()), 4)
    again = interrupted(tmp_path / "parts", lambda: adapted(build()))
    assert same(whole.model, again.model)


def test_what_is_trained_beside_the_adapters_comes_back_as_well(tmp_path):
    def build():
        torch.manual_seed(0)
        model = adapted(deepseek_v3(), modules=["o_proj"])
        model.get_submodule("base_model.model.lm_head").weight.requires_grad_(True)
        return model

    whole = train(tmp_path / "whole", build(), 4, controller=Sign(0.01))
    again = interrupted(tmp_path / "parts", build, controller=Sign(0.01))
    assert same(whole.model, again.model)
    biases = [tensor for name, tensor in again.model.state_dict().items() if name.endswith("correction_bias")]
    assert all(bias.abs().max() > 0 for bias in biases)


def test_other_adapters_are_refused_before_anything_is_assigned(tmp_path):
    train(tmp_path, adapted(hf_model()), 1)
    other = get_peft_model(hf_model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit the adapters of this model: .*lora_A.*same get_peft_model"):
        train(tmp_path, other, 2, resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_saving_a_model_with_adapters_is_refused_with_the_way_out(tmp_path):
    model = train(tmp_path / "run", adapted(ours()), 1).model
    with pytest.raises(ValueError, match=r"save_pretrained\(folder\).*merge_and_unload"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    expected = logits(model)
    save(model.merge_and_unload(), tmp_path / "model")
    assert torch.allclose(logits(load(tmp_path / "model")), expected, atol=1e-5)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["recipe"]["num_experts"] == 4
