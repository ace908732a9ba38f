"""What `count` says of every named recipe, against the FLOPs that torch counts while the model runs."""

from __future__ import annotations

import warnings
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from moeify import MoE, sparsify
from moeify.backends import order
from moeify.context import extra_inputs
from moeify.experts import Latent, ffn, lora
from moeify.flops import count
from moeify.kernels import naive_grouped_linear
from moeify.routers import Capacity
from moeify.sparsify import recipes
from moeify.sparsify.convert import convert
from nights import one_of_each
from tiny_models import causal_lm, inputs, masked_lm

AT_MOST = {
    "expert_threshold": "the number of experts varies", "remoe": "the number of experts varies",
    "topp": "the number of experts varies", "dynmoe": "the number of experts varies",
    "noisy": "the noise has weights, of training only",
    "llama_moe": "the noise has weights, of training only",
    "mobile_vmoe": "one decision per image", "mocle": "one decision per sample",
}  # fmt: skip
ON_AVERAGE = {"longcat": "zero experts are free", "moepp": "zero and copy experts are free"}
ON_AVERAGE["zaya"] = "the expert that skips is free"
NOT_CAUSAL = {"base", "sbase", "limoe", "mobile_vmoe", "soft", "vmoe"}
BATCH, LENGTH = 2, 12


def built(recipe: str) -> PreTrainedModel:
    eager = {"attn_implementation": "eager"}
    model = masked_lm("bert", **eager) if recipe in NOT_CAUSAL else causal_lm("llama", **eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify(model, recipes[recipe], verbose=False)
    for part in model.modules():
        if isinstance(part, Capacity):
            part.eval_factor = 100.0
    return model.eval()


def ran(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> float:
    """FLOPs per token that torch saw, experts by plain matrix products and only once each."""
    monkeypatch.setattr(order, "choose", lambda *call: "compose")  # of the experts inside others
    for module in (ffn, lora):
        monkeypatch.setattr(module, "grouped_linear", naive_grouped_linear)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), extra_inputs(model, cluster=[0, 1]):
        model(input_ids=inputs(model, BATCH, LENGTH)["input_ids"])
    rotary = sum(sum(ops.values()) for name, ops in counter.flop_counts.items() if name.endswith(".rotary_emb"))
    return (counter.get_total_flops() - rotary) / (BATCH * LENGTH)


@pytest.mark.parametrize("recipe", one_of_each(recipes))
def test_a_model_runs_what_is_counted_whatever_its_recipe(recipe: str, monkeypatch: pytest.MonkeyPatch):
    model = built(recipe)
    brings_outputs = {"mole", "default_moe"}
    for part in model.modules():
        if isinstance(part, MoE):
            part.backend = "precomputed" if recipe in brings_outputs else "compose"
            part.backend = "latent" if isinstance(part.experts, Latent) else part.backend
    counted, measured = count(model, tokens=LENGTH).flops, ran(model, monkeypatch)
    if recipe in AT_MOST:
        assert measured < counted
    elif recipe in ON_AVERAGE:
        assert measured == pytest.approx(counted, rel=0.1)
    else:
        assert round(measured) == counted


def test_a_base_that_all_experts_share_is_run_for_every_row_and_is_active_once():
    model = built("mixlora")
    dense = count(causal_lm("llama"))
    (layer, *_) = [part for part in model.modules() if isinstance(part, MoE)]
    base = sum(p.numel() for part in layer.experts.common_modules() for p in part.parameters())
    one = 2 * sum(p.numel() for p in (layer.experts.up_lora.lora_A, layer.experts.up_lora.lora_B)) / 8
    one += 2 * sum(p.numel() for p in (layer.experts.down_lora.lora_A, layer.experts.down_lora.lora_B)) / 8
    k, router = 2, 2 * layer.router.weight.numel()
    only = count(layer)
    assert only.flops == k * (2 * base + one) + router
    assert only.dense_flops == 8 * (2 * base + one) + router
    assert only.active_parameters == base + k * one / 2 + router / 2
    assert count(model).flops > dense.flops


def test_the_table_of_mixlora_tells_what_torch_counts(monkeypatch: pytest.MonkeyPatch):
    model = causal_lm("llama", attn_implementation="eager")
    report = convert(model, recipes["mixlora"])
    report.show(Console(file=(shown := StringIO()), width=120))
    for part in model.modules():
        if isinstance(part, MoE):
            part.backend = "compose"
    attention = count(model, tokens=LENGTH).flops - count(model).flops  # of scores, which the table leaves out
    assert report.after.flops == round(ran(model, monkeypatch)) - attention
    assert report.after.flops > report.before.flops
    row = next(line for line in shown.getvalue().splitlines() if "forward FLOPs per token" in line)
    assert f"{report.before.flops:,}" in row
    assert f"{report.after.flops:,}" in row
