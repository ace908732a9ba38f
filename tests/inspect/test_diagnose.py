"""Every fault is found in a tiny model broken so, and not in its healthy twin; what cannot be told is unknown."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import moe_families
import tiny_models
from moeify import MoE
from moeify.balance import Sign
from moeify.experts import FFN
from moeify.inspect import FAULTS, diagnose
from moeify.inspect.capture import capture
from moeify.inspect.measurements.layer_inputs import layer_inputs, parameters_of
from moeify.inspect.measurements.outliers import expert_outputs
from moeify.inspect.panels.super_experts import super_experts
from moeify.layers import sparse_layers
from moeify.routers import Soft, TopK
from moeify.train import SparseArguments, SparseTrainer

PROGRAMS = Path(__file__).parents[2] / "benchmarks"
FAMILY = dict.fromkeys(("biased_weights", "bias_unmoved"), "deepseek_v3")
FAMILY |= dict.fromkeys(("blind_collapse", "collapse", "dead_experts"), "gpt_oss")  # whose router has a bias
OF_TRAINING = ("balance_off", "balance_accumulated", "balance_pooled", "balance_padded")
OF_LOAD = ("blind_collapse", "collapse", "dead_experts")


@pytest.fixture
def broken(monkeypatch):
    """The programs that break models."""
    monkeypatch.syspath_prepend(PROGRAMS)
    return importlib.import_module("broken_models")


@pytest.fixture
def case(broken, request):
    """A tiny model in which nothing is wrong."""
    return broken.Case(model(*getattr(request, "param", ())), batches())


def model(family="mixtral"):
    """A tiny model; of DeepSeek-V3 with selection biases that have moved."""
    torch.manual_seed(0)
    built = tiny_models.SPARSE[family](**({"n_group": 1} if family == "deepseek_v3" else {"num_local_experts": 8}))
    for layer in sparse_layers(built).values():
        for owner, name in layer.selection_biases():
            getattr(owner, name).copy_(torch.linspace(-0.05, 0.05, layer.num_experts))
    return built


def batches(count=3, size=8, length=64):
    return [{"input_ids": tiny_models.tokens(size, length, seed)} for seed in range(count)]


def names(diagnosis):
    return [found.fault for found in diagnosis.findings]


def cases():
    return [pytest.param((FAMILY.get(fault, "mixtral"),), fault, id=fault) for fault in FAULTS]


@pytest.mark.parametrize(("case", "fault"), cases(), indirect=["case"])
def test_a_fault_is_found_where_it_was_put_in_and_only_there(broken, case, fault):
    of_training = fault in OF_TRAINING
    healthy = diagnose(case.model, case.batches, trainer=case.trainer() if of_training else None, faults=[fault])
    assert not healthy.findings
    assert not healthy.unknown
    layer = case.layer.name
    broken.INJECTORS[fault](case)
    found = diagnose(case.model, case.batches, trainer=case.trainer() if of_training else None, faults=[fault])
    assert names(found) == [fault]
    assert found.status == "findings"
    finding = found.findings[0]
    assert not finding.layer or finding.layer.startswith(layer)
    assert any(digit.isdigit() for digit in finding.evidence)
    assert finding.cause
    assert finding.fix


def test_every_fault_can_be_put_in(broken):
    assert broken.INJECTORS.keys() == FAULTS.keys()


def test_too_few_tokens_are_unknown_and_no_data_too():
    few = diagnose(model(), batches(1, 1, 16))
    assert few.status == "unknown"
    assert not few.findings
    assert set(OF_LOAD) <= set(few.unknown)
    assert not set(OF_LOAD) & set(few.healthy)
    assert "16 tokens" in few.unknown["dead_experts"] or "would get 4 rows" in few.unknown["dead_experts"]
    none = diagnose(model())
    assert none.status == "unknown"
    assert "there are no batches" in none.unknown["collapse"]


def test_faults_of_training_are_not_asked_without_a_trainer():
    diagnosis = diagnose(model(), batches())
    assert diagnosis.status == "healthy"
    assert set(diagnosis.unchecked) == set(OF_TRAINING)
    assert not set(diagnosis.unchecked) & set(diagnosis.healthy)


def test_a_diagnosis_leaves_weights_gradients_modes_and_random_numbers_as_they_were(case):
    whole, trainer = case.model, case.trainer()
    whole.train()
    whole.lm_head.weight.grad = torch.ones_like(whole.lm_head.weight)
    before, state = {n: p.clone() for n, p in whole.state_dict().items()}, torch.get_rng_state()
    diagnose(whole, case.batches, trainer=trainer)
    assert all(torch.equal(before[n], p) for n, p in whole.state_dict().items())
    assert [n for n, p in whole.named_parameters() if p.grad is not None] == ["lm_head.weight"]
    assert whole.training
    assert torch.equal(whole.lm_head.weight.grad, torch.ones_like(whole.lm_head.weight))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for layer in sparse_layers(whole).values()
                   for m in layer.module.modules())  # fmt: skip


def test_transformers_own_trainer_pools_the_layers_and_multiplies_by_the_accumulation(tmp_path):
    sparse = model()
    sparse.config.output_router_logits, sparse.config.router_aux_loss_coef = True, 0.01
    args = transformers.TrainingArguments(tmp_path, gradient_accumulation_steps=4, use_cpu=True, report_to=[])
    found = diagnose(sparse, batches(), trainer=transformers.Trainer(sparse, args), faults=OF_TRAINING)
    assert names(found) == ["balance_accumulated", "balance_pooled"]
    assert "4.00 times" in found.findings[0].evidence


def test_a_loop_of_ones_own_is_judged_like_a_trainer():
    sparse = model()

    def step(batches):
        for batch in batches:
            sparse(**batch).loss.backward()

    assert names(diagnose(sparse, batches(), trainer=step, faults=["balance_off"])) == ["balance_off"]
    with pytest.raises(TypeError, match="cannot be rehearsed"):
        diagnose(sparse, batches(), trainer=3)


def test_a_controller_balances_without_a_loss(tmp_path):
    sparse = model("deepseek_v3")
    args = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    arguments = SparseArguments(balance=0, controller=Sign())
    trainer = SparseTrainer(sparse, args, sparse=arguments)
    assert not diagnose(sparse, batches(), trainer=trainer, faults=["balance_off"]).findings
    trainer.sparse = replace(arguments, controller=None)
    assert names(diagnose(sparse, batches(), trainer=trainer, faults=["balance_off"])) == ["balance_off"]


@pytest.mark.parametrize("case", [("gpt_oss",)], indirect=True)
def test_a_trace_alone_tells_of_loads_and_the_rest_is_not_asked(broken, case):
    broken.INJECTORS["dead_experts"](case)
    found = diagnose(capture(case.model, case.batches))
    assert "dead_experts" in names(found)
    assert {"identical_experts", "not_finite", "balance_off"} <= found.unchecked.keys()
    assert found.unchecked["not_finite"] == "only a trace was given, no model"


def test_a_dense_mixture_is_never_called_collapsed():
    found = diagnose(nn.Sequential(MoE(Soft(16, 4), FFN(4, 16, 32))), ())
    assert not found.findings
    assert found.status == "unknown"


def test_a_model_of_ours_is_diagnosed_like_one_of_transformers():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(TopK(16, 4, init_std=0.5), FFN(4, 16, 32))

        def forward(self, x):
            y = self.moe(x)
            return {"loss": y.square().mean(), "y": y}

    torch.manual_seed(0)
    found = diagnose(Decoder(), [{"x": torch.randn(4, 256, 16)}])
    assert found.status == "healthy", str(found)


def test_a_diagnosis_is_text_and_json(case, broken):
    broken.INJECTORS["identical_experts"](case)
    found = diagnose(case.model, case.batches)
    assert json.loads(json.dumps(found.to_dict()))["findings"][0]["fault"] == "identical_experts"
    said = str(found)
    assert said.startswith("1 finding\n")
    assert "evidence" in said
    assert "fix" in said
    assert "not found: not_finite" in said


def test_dense_models_and_unknown_faults_are_refused():
    with pytest.raises(ValueError, match="no sparse layer to diagnose"):
        diagnose(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no fault is called 'collapsed'"):
        diagnose(model(), faults=["collapsed"])


def test_progress_names_every_fault():
    seen = []
    diagnose(model(), (), progress=seen.append)
    assert seen == list(FAULTS)


def test_rows_whose_weight_is_zero_do_not_make_their_expert_a_frozen_one(case):
    case.layer.router.register_forward_hook(lambda router, args, out: (out[0], out[1] * (out[2] != 3), out[2]))
    found = diagnose(case.model, case.batches, faults=["frozen_experts", "capacity_drops"])
    assert names(found) == ["capacity_drops"]


def test_the_page_lists_every_fault_in_the_order_of_the_findings():
    page = (PROGRAMS.parent / "docs" / "guide" / "diagnosing.md").read_text(encoding="utf-8")
    of_models = page.partition("| fault | found if | from |")[2]
    assert re.findall(r"^\| `(\w+)` \|", of_models, re.MULTILINE) == list(FAULTS)


def test_every_fault_says_what_it_is_and_where_its_threshold_comes_from():
    for fault in FAULTS.values():
        assert len(fault.__doc__.splitlines()[0]) > 40, fault.__name__


def test_a_fault_of_many_layers_is_said_once():
    torch.manual_seed(0)
    whole = tiny_models.deepseek_v3(num_hidden_layers=6)
    said = str(diagnose(whole, (), faults=["bias_unmoved"]))
    assert said.startswith("5 findings\n")
    assert said.count("bias_unmoved") == 1
    assert "model.layers.1.mlp, model.layers.2.mlp, model.layers.3.mlp and 2 more" in said


def test_experts_that_are_not_called_by_rows_are_unknown():
    whole = moe_families.build("llama4_text")
    found = diagnose(whole, [moe_families.inputs(whole)], faults=["super_experts"])
    assert "Llama4TextMoe cannot be called one by one" in found.unknown["super_experts"]


@pytest.mark.parametrize("family", ["mixtral", "dbrx", "longcat_flash", "switch_transformers"])
def test_the_report_and_the_diagnosis_name_the_same_super_expert(family):
    whole = moe_families.build(family)
    batches = [moe_families.inputs(whole, batch=4, length=16)]
    assert diagnose(whole, batches, faults=["super_experts"]).healthy == ("super_experts",)
    layer = next(iter(sparse_layers(whole).values()))
    expert = int(capture(whole, batches).layers[layer.name].assigned[:8].argmax())
    parameters_of(layer, expert)[-1].mul_(1e5)
    (found,) = diagnose(whole, batches, faults=["super_experts"]).findings
    assert (found.layer, found.evidence.split(" reaches")[0]) == (layer.name, f"expert {expert}")
    advice = super_experts(expert_outputs(layer_inputs(whole, batches))).advice
    assert advice.finding.startswith("1 of")
    assert f"{expert} in {layer.name}" in advice.finding


def test_experts_without_weights_are_not_called_frozen():
    whole = moe_families.build("longcat_flash", zero_expert_num=8)
    batches = [{"input_ids": torch.randint(1, whole.config.vocab_size, (2, 16))}]
    found = diagnose(whole, batches, faults=["frozen_experts", "super_experts"])
    assert not found.findings
    assert "super_experts" in found.healthy
