from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from moeify import MoE
from moeify.experts import FFN
from moeify.hf.interface import use_moeify_experts
from moeify.layers import sparse_layers
from moeify.losses import balance, share, z
from moeify.record import observe, record
from moeify.routers import TopK, sigmoid, softmax, sqrt_softplus
from moeify.routing import Assignment
from tiny_models import SPARSE, causal_lm, gpt_oss, inputs, mixtral, tokens


def deepseek_v4() -> PreTrainedModel:
    model = causal_lm(
        "deepseek_v4", num_key_value_heads=1, head_dim=16, q_lora_rank=16, o_groups=4, o_lora_rank=16,
        n_routed_experts=8, num_experts_per_tok=2, mlp_layer_types=["hash_moe", "moe"], index_head_dim=8,
    )  # fmt: skip
    table = dict(model.named_buffers())["model.layers.0.mlp.gate.tid2eid"]
    table.copy_(torch.rand(len(table), 8, generator=torch.Generator().manual_seed(0)).topk(2).indices)
    return model


def gemma4() -> PreTrainedModel:
    return causal_lm(
        "gemma4_text", enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=16,
        global_head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    )  # fmt: skip


MODELS = SPARSE | {"deepseek_v4": deepseek_v4, "gemma4": gemma4}
SCORES = {
    "mixtral": softmax,
    "qwen3_moe": softmax,
    "olmoe": softmax,
    "gpt_oss": softmax,
    "deepseek_v3": sigmoid,
    "deepseek_v4": sqrt_softplus,
}


@contextmanager
def _router_outputs(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Logits, weights and choices that every router returned."""
    outputs = {}
    handles = [
        layer.router.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
        for name, layer in sparse_layers(model).items()
        if layer.router is not None
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def _dense(routing: Assignment) -> Tensor:
    """Weight of every expert in every token."""
    dense = torch.zeros(routing.shape[0], len(routing.counts))
    return dense.index_put((routing.source, routing.expert), routing.weight.float(), accumulate=True)


def _dense_output(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(index), num_experts).scatter_add(1, index, weights.float())


@pytest.mark.parametrize("family", MODELS)
def test_the_decision_is_what_the_block_used(family: str):
    model = MODELS[family]()
    with _router_outputs(model) as outputs, record(model) as decisions:
        model(**inputs(model))
    assert decisions.keys() == outputs.keys()
    assert len(decisions) >= 2
    for name, (_, weights, index) in outputs.items():
        routing = decisions[name]
        torch.testing.assert_close(_dense(routing), _dense_output(index, weights, len(routing.counts)))
        assert torch.equal(routing.assigned, index.flatten().bincount(minlength=len(routing.counts)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SPARSE)
def test_padding_is_left_out_of_native_decisions(family: str, side: str):
    model = SPARSE[family]()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    real = mask.flatten().nonzero().squeeze(1)
    with _router_outputs(model) as outputs, record(model) as decisions:
        model(input_ids=tokens(), attention_mask=mask)
    for name, (logits, weights, index) in outputs.items():
        routing = decisions[name]
        dense = _dense_output(index, weights, len(routing.counts)) * mask.flatten().unsqueeze(1)
        torch.testing.assert_close(_dense(routing), dense)
        torch.testing.assert_close(routing.logits, logits[real])
        assert routing.sequence_id.tolist() == [0] * 12 + [1] * 7


@pytest.mark.parametrize("family", SCORES)
def test_the_score_function_is_inferred(family: str):
    model = MODELS[family]()
    with record(model) as decisions:
        model(**inputs(model))
    for routing in decisions.values():
        torch.testing.assert_close(routing.scores, SCORES[family](routing.logits))


def test_a_router_that_returns_probabilities_has_their_logarithms_as_logits():
    model = gemma4()
    with _router_outputs(model) as outputs, record(model) as decisions:
        model(**inputs(model))
    for name, (probabilities, _, _) in outputs.items():
        torch.testing.assert_close(decisions[name].scores, probabilities)
        torch.testing.assert_close(decisions[name].logits.softmax(-1), probabilities)


def _set_experts(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    if implementation == "moeify":
        return use_moeify_experts(model)
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["grouped_mm", "moeify"])
@pytest.mark.parametrize("family", SPARSE)
def test_decisions_do_not_depend_on_how_experts_are_computed(family: str, implementation: str):
    recorded = []
    for name in ("eager", implementation):
        model = _set_experts(SPARSE[family](), name)
        with record(model) as decisions:
            model(**inputs(model))
        recorded.append({layer: _dense(routing) for layer, routing in decisions.items()})
    torch.testing.assert_close(recorded[1], recorded[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_the_balance_loss_of_a_native_layer_reaches_its_router(family: str):
    model = MODELS[family]()
    with record(model) as decisions:
        model(**inputs(model))
    losses = [balance(routing) + z(routing) for routing in decisions.values()]
    torch.stack(losses).mean().backward()
    for name, layer in sparse_layers(model).items():
        gradients = [p.grad for p in layer.router.parameters() if p.grad is not None]
        assert any(g.abs().max() > 0 for g in gradients), name


def test_the_balance_loss_of_mixtral_is_the_formula_on_its_own_logits():
    model = mixtral()
    with record(model) as decisions:
        out = model(**inputs(model), output_router_logits=True)
    ours = torch.stack([balance(routing) for routing in decisions.values()])
    expected = []
    for logits in out.router_logits:
        p = logits.softmax(-1)
        f = torch.zeros_like(p).scatter(1, p.topk(2).indices, 0.5).mean(0)
        expected.append(4 * (f * p.mean(0)).sum())
    torch.testing.assert_close(ours, torch.stack(expected))


def _collapsed(num_experts: int, k: int, layers: int) -> PreTrainedModel:
    """Every layer sends all tokens to the same k experts, the next layer to the next k."""
    model = gpt_oss(num_local_experts=num_experts, num_experts_per_tok=k, num_hidden_layers=layers)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            block.mlp.router.weight.zero_()
            block.mlp.router.bias.fill_(-50.0)[layer * k : (layer + 1) * k] = 0.0
    return model


@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 2)])
def test_a_pooled_loss_calls_collapsed_layers_perfect_and_ours_does_not(num_experts: int, k: int):
    model = _collapsed(num_experts, k, layers=num_experts // k)
    with record(model) as decisions:
        out = model(**inputs(model), output_router_logits=True)
    floor_of_transformers = k
    assert out.aux_loss.item() == pytest.approx(floor_of_transformers, rel=1e-4)
    for routing in decisions.values():
        assert balance(routing).item() == pytest.approx(num_experts / k, rel=1e-4)


def test_deepseek_v3_has_no_balance_loss_and_ours_follows_its_sigmoid():
    model = SPARSE["deepseek_v3"]()
    with record(model) as decisions:
        out = model(**inputs(model))
    assert getattr(out, "aux_loss", None) is None
    routing = next(iter(decisions.values()))
    p = routing.logits.sigmoid() / routing.logits.sigmoid().sum(-1, keepdim=True)
    f = routing.counts / routing.counts.sum()
    torch.testing.assert_close(balance(routing), 8 * (f * p.mean(0)).sum())


def test_the_loss_of_transformers_is_blind_to_a_selection_bias_and_ours_is_not():
    theirs, ours = [], []
    for bias in (0.0, 10.0):
        model = deepseek_v4()
        model.model.layers[-1].mlp.gate.e_score_correction_bias[:2] = bias
        with record(model) as decisions:
            theirs.append(model(**inputs(model), output_router_logits=True).aux_loss)
        ours.append(decisions["model.layers.1.mlp"])
    assert theirs[0] == theirs[1]
    assert share(ours[1]).tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert balance(ours[0]) != balance(ours[1])


@pytest.mark.parametrize("family", SPARSE)
def test_checkpointed_layers_are_recorded_once_and_get_the_same_gradient(family: str):
    gradients = []
    for checkpointed in (False, True):
        model = SPARSE[family]().train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        seen: list[tuple[str, Assignment]] = []
        handles = observe(model, lambda name, routing, seen=seen: seen.append((name, routing)))
        loss = model(**inputs(model)).loss + torch.stack([balance(routing) for _, routing in seen]).mean()
        loss.backward()
        assert len(seen) == len({name for name, _ in seen}) == len(sparse_layers(model))
        for handle in handles:
            handle.remove()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_generation_with_a_cache_and_left_padding_records_the_last_token():
    model = mixtral()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    with record(model) as decisions:
        model.generate(input_ids=tokens(), attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert all(routing.choices.indices.shape == (2, 2) for routing in decisions.values())


def test_nothing_is_recorded_after_the_block_ends():
    model = mixtral()
    with record(model) as decisions:
        pass
    model(**inputs(model))
    assert decisions == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_dense_model_has_no_decisions():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse layer"), record(causal_lm("llama")):
        pass


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def _two_layers(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(*(wrap(MoE(TopK(8, 4), FFN(4, 8, 16))) for _ in range(2)))


def test_our_layers_are_recorded_by_name():
    model = _two_layers(lambda layer: layer)
    x = torch.randn(2, 5, 8)
    with record(model) as decisions:
        model(x)
    assert list(decisions) == ["0", "1"]
    expected = model[0].router(x, model[0].context)
    torch.testing.assert_close(decisions["0"].choices.weights, expected.choices.weights)


def test_our_checkpointed_layers_are_recorded_once_even_if_the_observer_computes_a_loss():
    model = _two_layers(Checkpointed)
    losses = {}
    observe(model, lambda name, routing: losses.update({name: [*losses.get(name, []), balance(routing)]}))
    y = model(torch.randn(2, 5, 8, requires_grad=True)).square().sum()
    (y + sum(losses["0.inner"] + losses["1.inner"])).backward()
    assert [len(losses[name]) for name in ("0.inner", "1.inner")] == [1, 1]


def test_zero_experts_of_longcat_are_among_the_experts():
    model = causal_lm(
        "longcat_flash", num_hidden_layers=2, num_key_value_heads=4, ffn_hidden_size=48, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, moe_topk=6, n_routed_experts=4, zero_expert_num=2,
        expert_ffn_hidden_size=16,
    )  # fmt: skip
    with record(model) as decisions:
        model(**inputs(model))
    (routing,) = decisions.values()
    assert (routing.counts == routing.tokens).all()
    assert len(routing.counts) == routing.scores.shape[-1] == 6
