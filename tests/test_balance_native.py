"""Controllers on models of transformers, whose selection biases transformers itself never moves."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeify.balance import Control, Quantile, Sign, control
from moeify.record import observe, record
from ranks import on_ranks
from tiny_models import causal_lm, deepseek_v3, inputs, mixtral, tokens

RATE = 0.01


def glm4_moe(**config) -> PreTrainedModel:
    return causal_lm(
        "glm4_moe", **{
            "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
            "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_hidden_layers": 3,
        } | config,
    )  # fmt: skip


def minimax_m2() -> PreTrainedModel:
    """Its bias belongs to the block, not to the router."""
    return causal_lm("minimax_m2", num_local_experts=8, num_experts_per_tok=2, intermediate_size=16)


def afmoe() -> PreTrainedModel:
    """Its bias is a parameter of the block, by another name."""
    return causal_lm(
        "afmoe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1,
        num_hidden_layers=3, n_group=1, topk_group=1, global_attn_every_n_layers=2,
    )  # fmt: skip


def ernie4_5_moe() -> PreTrainedModel:
    """Its bias lies in a module of its own, with shape (1, E)."""
    return causal_lm(
        "ernie4_5_moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1,
        moe_num_shared_experts=1, num_hidden_layers=3,
    )  # fmt: skip


GROUPED = {"deepseek_v3": lambda: deepseek_v3(n_group=1, topk_group=1), "glm4_moe": glm4_moe}
ELSEWHERE = {"minimax_m2": minimax_m2, "afmoe": afmoe, "ernie4_5_moe": ernie4_5_moe}


def _controlled(model: PreTrainedModel, rule=None) -> tuple[Control, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0)
    return control(model, optimizer, Sign(RATE) if rule is None else rule), optimizer


def _values(controlled: Control) -> dict[str, Tensor]:
    return {name: bias.value.detach().clone() for name, bias in controlled.biases.items()}


def _skewed(seed: int = 0) -> dict[str, Tensor]:
    """Mostly the same token: routers send it to the same experts."""
    ids = tokens(4, 16, seed)
    ids[:, 2:] = 7
    return {"input_ids": ids, "labels": ids}


def _backward(model: PreTrainedModel, given: dict[str, Tensor]) -> None:
    model(**given).loss.backward()


@pytest.mark.parametrize("family", GROUPED | ELSEWHERE)
def test_a_bias_moves_by_the_rate_towards_the_underloaded_experts(family: str):
    model = (GROUPED | ELSEWHERE)[family]()
    controlled, optimizer = _controlled(model)
    assert len(controlled.biases) >= 2
    before = _values(controlled)
    with record(model) as decisions:
        _backward(model, _skewed())
    optimizer.step()
    for name, bias in _values(controlled).items():
        load = decisions[name].assigned.float()
        torch.testing.assert_close((bias - before[name]).flatten(), RATE * torch.sign(load.mean() - load))


def test_a_bias_does_not_move_before_the_optimizer_step():
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    before = _values(controlled)
    _backward(model, _skewed())
    torch.testing.assert_close(_values(controlled), before, atol=0, rtol=0)
    optimizer.step()
    assert any((_values(controlled)[name] != before[name]).any() for name in before)


def test_micro_batches_move_a_bias_once_by_what_they_saw_together():
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    loads: dict[str, Tensor] = {}
    handles = observe(model, lambda name, routing: loads.update({name: loads.get(name, 0) + routing.assigned.float()}))
    for seed in range(3):
        _backward(model, inputs(model, seed=seed))
    optimizer.step()
    for handle in handles:
        handle.remove()
    for name, bias in _values(controlled).items():
        torch.testing.assert_close(bias, RATE * torch.sign(loads[name].mean() - loads[name]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_are_counted_once(reentrant: bool):
    biases = []
    for checkpointed in (False, True):
        model = glm4_moe()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        controlled, _ = _controlled(model)
        _backward(model, _skewed())
        biases.append({name: seen["load"] for name, seen in controlled.seen.items()})
    torch.testing.assert_close(biases[1], biases[0], atol=0, rtol=0)


@pytest.mark.parametrize("gradients", [True, False])
def test_evaluation_does_not_move_a_bias(gradients: bool):
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    before = _values(controlled)
    model.eval()
    with torch.set_grad_enabled(gradients):
        model(**_skewed())
    model.train()
    optimizer.step()
    torch.testing.assert_close(_values(controlled), before, atol=0, rtol=0)


def test_generation_while_training_does_not_move_a_bias():
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    before = _values(controlled)
    model.generate(input_ids=tokens(), max_new_tokens=2, do_sample=False)
    optimizer.step()
    torch.testing.assert_close(_values(controlled), before, atol=0, rtol=0)


def test_a_removed_or_frozen_controller_moves_nothing():
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    controlled.active = False
    _backward(model, _skewed())
    optimizer.step()
    controlled.active = True
    controlled.remove()
    _backward(model, _skewed())
    optimizer.step()
    assert all((bias == 0).all() for bias in _values(controlled).values())


def _max_violation(model: PreTrainedModel, given: dict[str, Tensor]) -> float:
    """MaxVio: how far the fullest expert of any layer is above the mean, relative to the mean."""
    with torch.no_grad(), record(model) as decisions:
        model(**given)
    return max((r.assigned.max() / r.assigned.float().mean() - 1).item() for r in decisions.values())


@pytest.mark.parametrize("rule", [Sign(RATE), Quantile()])
@pytest.mark.parametrize("family", GROUPED)
def test_a_controller_balances_skewed_tokens(family: str, rule):
    model = GROUPED[family]()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(32) * 0.3)  # all tokens lean the same way
    controlled, optimizer = _controlled(model, rule)
    given = inputs(model, batch=8, length=32)
    before = _max_violation(model, given)
    for _ in range(60):
        model(**given)
        optimizer.step()
    assert before > 1.0
    assert _max_violation(model, given) < before / 3
    assert all(bias.abs().max() > 0 for bias in _values(controlled).values())


def test_biases_of_a_model_in_bf16_are_moved_in_fp32():
    model = glm4_moe().bfloat16()
    gates = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    for gate in gates:
        gate.e_score_correction_bias.fill_(1.0)
    _, optimizer = _controlled(model, Sign(1e-3))
    for _ in range(3):
        _backward(model, _skewed())
        optimizer.step()
    for gate in gates:
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert (gate.e_score_correction_bias - 1.0).abs().max().item() == pytest.approx(3e-3, rel=1e-3)


def test_a_model_that_is_cast_later_is_moved_in_fp32_again():
    model = glm4_moe()
    gates = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    _, optimizer = _controlled(model, Sign(1e-3))
    model.to(torch.bfloat16)
    for gate in gates:
        gate.e_score_correction_bias.fill_(1.0)
        assert gate.e_score_correction_bias.dtype == torch.bfloat16
    for _ in range(3):
        _backward(model, _skewed())
        optimizer.step()
    for gate in gates:
        assert (gate.e_score_correction_bias - 1.0).abs().max().item() == pytest.approx(3e-3, rel=1e-3)


def test_a_moved_bias_is_saved_with_the_model(tmp_path: Path):
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    _backward(model, _skewed())
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, value in _values(controlled).items():
        assert (value != 0).any()
        torch.testing.assert_close(loaded.get_submodule(name).gate.e_score_correction_bias, value)


def test_a_model_without_a_selection_bias_cannot_be_controlled():
    model = mixtral()
    with pytest.raises(ValueError, match="no router of MixtralForCausalLM has a selection bias"):
        _controlled(model)


def _train_one_step(rank: int, ranks: int) -> list[dict[str, list[float]]]:
    """The load that a rank saw by itself, and the biases after its step."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    model = glm4_moe()
    controlled, optimizer = _controlled(model)
    _backward(model, inputs(model, seed=rank))
    own = {name: seen["load"].tolist() for name, seen in controlled.seen.items()}
    optimizer.step()
    return [own, {name: bias.tolist() for name, bias in _values(controlled).items()}]


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="ranks are forked off a server")
def test_two_processes_move_a_bias_by_what_both_saw():
    (load_0, bias_0), (load_1, bias_1) = on_ranks(2, _train_one_step)
    assert bias_0 == bias_1
    for name, bias in bias_0.items():
        assert load_0[name] != load_1[name]
        together = torch.tensor(load_0[name]) + torch.tensor(load_1[name])
        torch.testing.assert_close(torch.tensor(bias), RATE * torch.sign(together.mean() - together))


def test_quantile_refuses_native_routers_that_limit_tokens_to_groups():
    with pytest.raises(ValueError, match=r"router of model\.layers\.\d\.mlp limits them to some groups"):
        _controlled(deepseek_v3(n_group=4, topk_group=2), Quantile())
