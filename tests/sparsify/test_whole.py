"""Attention modules and whole layers as experts, each called on the sequences that are routed to it."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from moeify import Recipe, load, record, save, sparsify
from moeify.find import modules
from moeify.flops import count
from moeify.layers import moe_layers
from moeify.routers import Lookup, TopK
from moeify.sparsify import dense, whole_modules
from tiny_models import causal_lm

PER_SEQUENCE = partial(TopK, k=2, per="sequence", init_std=1.0)
ATTENTION, LAYERS = r"self_attn$|attention$", r"layers\.\d+$"


def llama() -> nn.Module:
    model = causal_lm("llama", num_hidden_layers=2, attn_implementation="eager").eval()
    model.config.use_cache = False
    return model


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()


def given(model: nn.Module) -> dict:
    if hasattr(model, "vit"):
        return {"pixel_values": torch.randn(5, 3, 8, 8)}
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[2, 6:] = 0
    return {"input_ids": torch.randint(5, 60, (5, 9)), "attention_mask": mask}


def sparse(make, where: str, *, disturbed: bool = True) -> nn.Module:
    recipe = Recipe(where=modules(where), num_experts=3, router=PER_SEQUENCE, experts=whole_modules)
    model = sparsify(make(), recipe, allow_noncausal=True, verbose=False)
    for layer in moe_layers(model).values() if disturbed else ():
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("make", [llama, vit])
@pytest.mark.parametrize("where", [ATTENTION, LAYERS])
def test_copies_leave_the_model_as_it_was(make, where):
    model = make()
    inputs = given(model)
    before = model(**inputs).logits
    after = sparse(lambda: deepcopy(model), where, disturbed=False)(**inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [llama, vit])
@pytest.mark.parametrize("where", [ATTENTION, LAYERS])
def test_every_expert_runs_on_its_sequences_as_if_they_were_alone(make, where, tmp_path):
    model = sparse(make, where)
    inputs = given(model)
    first, calls = next(iter(moe_layers(model).values())), []
    first.register_forward_hook(lambda module, *call: calls.append(call), with_kwargs=True)
    with record(model) as decisions:
        together = model(**inputs).logits
    assert len(next(iter(decisions.values())).logits.topk(2).indices.unique(dim=0)) > 1
    for s in range(5):
        part = {key: value[s : s + 1] for key, value in inputs.items()}
        with record(model) as decisions:
            alone = model(**part).logits
        choices = next(iter(decisions.values())).choices
        args, named, output = calls[-1]
        answers = [main(first.experts.experts[e](*args, **named)) for e in choices.indices[0].tolist()]
        expected = sum(weight * answer for weight, answer in zip(choices.weights[0], answers, strict=True))
        torch.testing.assert_close(main(output), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[s : s + 1][real_of(part)], alone[real_of(part)], rtol=1e-3, atol=1e-3)
    save(model, tmp_path / "model")
    torch.testing.assert_close(load(tmp_path / "model")(**inputs).logits[real_of(inputs)], together[real_of(inputs)])


def real_of(inputs: dict):
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else slice(None)


def main(output):
    return output[0] if isinstance(output, tuple) else output


def test_counted_flops_are_those_that_run():
    model = sparse(llama, ATTENTION)
    ids = torch.randint(5, 60, (4, 8))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    rotary = sum(sum(ops.values()) for name, ops in counter.flop_counts.items() if name.endswith(".rotary_emb"))
    routers = 2 * (8 - 1) / 8 * 2 * 3 * 32  # one decision per sequence, and not per token
    assert (counter.get_total_flops() - rotary) / 32 + routers == pytest.approx(count(model, tokens=8).flops, rel=1e-3)


def test_a_column_may_decide_and_keeps_a_decoder_causal():
    router = partial(Lookup, key="task", size=2, k=1)
    recipe = Recipe(where=modules(ATTENTION), num_experts=2, router=router, experts=whole_modules)
    assert moe_layers(sparsify(llama(), recipe, verbose=False))


def test_what_cannot_be_is_refused_in_a_sentence():
    per_token = Recipe(where=modules(ATTENTION), num_experts=4, experts=whole_modules)
    with pytest.raises(ValueError, match="tokens of one sequence have different experts or weights"):
        sparsify(llama(), per_token, verbose=False)
    with pytest.raises(ValueError, match="decides by looking at later tokens"):
        sparsify(
            llama(),
            Recipe(where=modules(LAYERS), num_experts=3, router=PER_SEQUENCE, experts=whole_modules),
            verbose=False,
        )
    model = sparse(llama, ATTENTION)
    with pytest.raises(ValueError, match=r"keep no cache.*use_cache = False"):
        model(**given(model), use_cache=True)
    assert model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, use_cache=False).shape == (1, 4)
    with pytest.raises(ValueError, match="shared=nothing"):
        sparsify(
            vit(),
            Recipe(where=modules(ATTENTION), num_experts=3, router=PER_SEQUENCE, experts=whole_modules, shared=dense),
            verbose=False,
        )
    with pytest.raises(ValueError, match="experts=whole_modules"):
        sparsify(llama(), Recipe(where=modules(ATTENTION), num_experts=3), verbose=False)
