"""Every MoE family of the installed transformers is seen, recorded, traced and counted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import moe_families as families
from moeify.backends.plain import compose
from moeify.experts import FFN, Each, Plain
from moeify.find.where import ffn
from moeify.flops import count
from moeify.hf.blocks import unwrapped
from moeify.inspect.capture import capture
from moeify.kernels.stacked import Glu
from moeify.layers import SparseLayer, sparse_layers
from moeify.losses import balance
from moeify.record import record
from moeify.routing import Assignment
from moeify.train.calibrate import calibrate_all_experts

OTHER_WAYS = ["switch_transformers", "nllb-moe", "jetmoe", "llama4_text", "doge", "dbrx"]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_seen_recorded_traced_and_counted(family: str):
    model = families.build(family)
    layers = sparse_layers(model)
    inputs = families.inputs(model)
    with record(model) as decisions:
        trace = capture(model, [inputs])
    assert decisions
    assert decisions.keys() <= layers.keys()
    assert trace.layers.keys() == decisions.keys()
    for name, routing in decisions.items():
        rows, tokens, layer = layers[name].rows_per_token(), inputs["input_ids"].numel(), trace.layers[name]
        assert int(routing.assigned.sum()) == rows * tokens
        assert len(routing.counts) == layers[name].num_experts == layer.num_experts
        latest = layer.take(torch.arange(len(layer.tokens))[-tokens:])  # some families call a layer several times
        assert torch.equal(latest.counts, routing.counts)
        assert layer.tokens.ids.view(-1, tokens).eq(inputs["input_ids"].flatten()).all()
    counted = count(model)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    saved = sum(
        sum(p.numel() for p in layer.experts.parameters()) * (1 - layer.rows_per_token() / layer.num_experts)
        for layer in layers.values()
    )
    if family != "longcat_flash":  # its zero experts have first maps, which nobody uses
        assert counted.parameters - counted.active_parameters == pytest.approx(saved, abs=1)


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_padding_and_sequences_of_a_decoder_are_not_those_of_its_encoder(family: str):
    model = families.build(family, decoder_start_token_id=0)
    source, target = (torch.arange(8) < torch.tensor(lengths).unsqueeze(1) for lengths in ([6, 2, 8], [3, 8, 1]))
    ids = families.inputs(model, batch=3)["input_ids"]
    given = {"input_ids": ids, "attention_mask": source.long(), "labels": ids.where(target, -100)}
    masked = {"decoder_attention_mask": target.long()}
    for batch in (given, given | masked, given | masked | {"decoder_input_ids": ids}):
        with record(model) as decisions:
            model(**batch)
        assert {"decoder" in name for name in decisions} == {True, False}
        for name, routing in decisions.items():
            real = target if "decoder" in name else source
            sequences = torch.arange(3).unsqueeze(1).expand(3, 8)[real]
            assert len(routing.choices.indices) == int(real.sum())
            assert torch.equal(routing.evidence.sequence_id, sequences)


def test_no_family_of_the_installed_transformers_is_left_out():
    models = Path(transformers.__file__).parent / "models"
    routed = re.compile(r"^@use_experts_implementation|^class \w*(Experts|MoE|Moe|SparseMLP)\(nn\.", re.MULTILINE)
    found = {file.parent.name for file in models.glob("*/modeling_*.py") if routed.search(file.read_text("utf-8"))}
    assert found - families.folders() == families.NOT_BUILT.keys() & found


@pytest.mark.parametrize("family", OTHER_WAYS)
def test_no_experts_are_put_beside_experts(family: str):
    model = families.build(family)
    layers = sparse_layers(model)
    try:
        sites = [site.name for site in ffn(model)]
    except ValueError as error:
        assert "sparse already" in str(error)  # noqa: PT017 (some of these families have dense layers, others none)
        sites = []
    assert not [site for site in sites if any(f"{site}.".startswith(f"{name}.") for name in layers)]
    assert bool(sites) == (family in ("switch_transformers", "nllb-moe"))


def _experts(layer: SparseLayer) -> list[nn.Module]:
    return [expert for name, expert in layer.experts.named_children() if name.startswith("expert_")]


def _block_call(family: str, **sizes) -> tuple[SparseLayer, Assignment, Tensor, Tensor]:
    """A feed-forward layer of a family, its decision, what it read and what came out."""
    model = families.build(family, **sizes)
    name, layer = next((n, layer) for n, layer in sparse_layers(model).items() if "attention" not in n)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        seen["x"], seen["y"] = args[0], output if isinstance(output, Tensor) else output[0]

    layer.module.register_forward_hook(keep)
    with torch.no_grad(), record(model) as decisions:
        model(**families.inputs(model))
    width = seen["x"].shape[-1]
    return layer, decisions[name], seen["x"].reshape(-1, width), seen["y"].reshape(-1, width)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [64, 1])
def test_switch_runs_the_rows_that_its_capacity_keeps(capacity: int):
    layer, routing, x, y = _block_call("switch_transformers", expert_capacity=capacity)
    torch.testing.assert_close(compose(x, routing, Each(_experts(layer))), y)
    assert int(routing.assigned.sum()) == len(x)
    assert (int(routing.counts.sum()) < len(x)) == (capacity == 1)
    assert torch.equal(routing.assigned, routing.logits.argmax(-1).bincount(minlength=8))
    torch.testing.assert_close(routing.scores, routing.logits.softmax(-1))


@torch.no_grad()
def test_nllb_runs_the_rows_that_transformers_computes():
    """It reads the one-hot mask of the first choices as expert numbers, so that only experts 0 and 1 run."""
    layer, routing, x, y = _block_call("nllb-moe")
    torch.testing.assert_close(compose(x, routing, Each(_experts(layer))), y)
    calls = dict.fromkeys(range(8), 0)
    for e, expert in enumerate(_experts(layer)):
        expert.register_forward_hook(lambda m, args, out, e=e: calls.update({e: calls[e] + len(args[0])}))
    layer.module(x.unsqueeze(0))
    assert routing.counts.tolist() == list(calls.values())


@torch.no_grad()
def test_llama4_weighs_what_its_experts_read():
    layer, routing, x, y = _block_call("llama4_text")
    theirs = unwrapped(layer.experts)
    experts = FFN(8, 32, 48, activation=Glu(theirs.act_fn))
    experts.gate_up_proj.copy_(theirs.gate_up_proj.transpose(1, 2))
    experts.down_proj.copy_(theirs.down_proj.transpose(1, 2))
    rows = experts(routing.dispatch(x) * routing.weight.unsqueeze(-1), routing.counts)
    unweighted = replace(routing, weight=torch.ones_like(routing.weight))
    torch.testing.assert_close(unweighted.combine(rows) + layer.shared(x), y)
    torch.testing.assert_close(routing.scores, routing.logits.sigmoid())


@torch.no_grad()
def test_jetmoe_runs_the_rows_of_its_router():
    layer, routing, x, y = _block_call("jetmoe")
    experts = FFN(8, 32, 48, activation=Glu(layer.module.activation))
    experts.gate_up_proj.copy_(layer.module.input_linear.weight)
    experts.down_proj.copy_(layer.module.output_linear.weight)
    torch.testing.assert_close(compose(x, routing, experts) + layer.module.bias, y)
    assert torch.equal(routing.choices.indices.sort().values, routing.logits.topk(2).indices.sort().values)


def test_jetmoe_has_attention_experts_too():
    names = sparse_layers(families.build("jetmoe"))
    assert sum("attention" in name for name in names) == sum("attention" not in name for name in names) == 4


@torch.no_grad()
@pytest.mark.parametrize("normalized", [False, True])
def test_doge_runs_the_rows_of_its_product_keys(normalized: bool):
    layer, routing, x, y = _block_call("doge", norm_topk_prob=normalized)
    experts = FFN(16, 32, 1, activation=Plain(layer.module.act_fn))
    experts.up_proj.copy_(layer.module.down_embed.weight.unsqueeze(1))
    experts.down_proj.copy_(layer.module.up_embed.weight.unsqueeze(2))
    gate, up, down = layer.shared
    shared = down(layer.module.act_fn(gate(x)) * up(x))
    torch.testing.assert_close(compose(x, routing, experts) + shared, y)


@torch.no_grad()
def test_dbrx_runs_the_rows_of_its_router():
    layer, routing, x, y = _block_call("dbrx")
    glu = layer.experts.mlp
    experts = FFN(8, 32, 16, activation=Glu(glu.activation_fn))
    maps = [w.view(8, 16, 32) for w in (glu.w1, glu.v1)]
    experts.gate_up_proj.copy_(torch.cat(maps, dim=1))
    experts.down_proj.copy_(glu.w2.view(8, 16, 32).transpose(1, 2))
    torch.testing.assert_close(compose(x, routing, experts), y)


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe", "jetmoe", "llama4_text", "dbrx"])
def test_a_balance_loss_reaches_their_routers(family: str):
    model = families.build(family)
    with record(model) as decisions:
        model(**families.inputs(model))
    torch.stack([balance(routing) for routing in decisions.values()]).mean().backward()
    for name in decisions:
        router = sparse_layers(model)[name].router
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in router.parameters()), name


@torch.no_grad()
@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
def test_experts_that_are_modules_are_shown_every_token(family: str):
    model = families.build(family)
    read: dict[nn.Module, int] = {}
    for layer in sparse_layers(model).values():
        for expert in _experts(layer):
            expert.register_forward_hook(lambda m, args, out: read.update({m: read.get(m, 0) + len(args[0])}))
    with calibrate_all_experts(model):
        model(**families.inputs(model))
    assert len(read) == sum(layer.num_experts for layer in sparse_layers(model).values())
    assert all(tokens >= 16 for tokens in read.values())


@pytest.mark.parametrize("family", ["jetmoe", "llama4_text", "doge"])
def test_experts_that_cannot_be_shown_every_token_are_refused(family: str):
    with pytest.raises(ValueError, match="does not call its experts"), calibrate_all_experts(families.build(family)):
        pass
