"""Weights from outside against a loop over tokens, and X-LoRA's two passes against PEFT's."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, sparsify
from moeify.compose import XLoRA
from moeify.experts import LoRA
from moeify.find import linears
from moeify.routers import InputWeights
from moeify.sparsify import frozen, lora
from strategies import agree, doubled
from tiny_models import TINY, inputs

D, E = 6, 3
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()


@pytest.mark.parametrize("shape", [(), (2,), (2, E), (2, 4, E), (2, 4, 5, E)])
def test_every_expert_answers_with_the_weight_that_was_given(shape):
    moe = MoE(InputWeights(D, E), LoRA(E, D, rank=2))
    nn.init.normal_(moe.experts.lora_B)
    moe.router.number = 3
    weights = torch.randn(shape, requires_grad=True)
    moe.context.mask(MASK)
    moe.context.call.inputs["adapter_weights"] = weights
    x = torch.randn(2, 4, D, requires_grad=True)
    p, x64, w64 = doubled(moe), x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    slow = torch.zeros(2, 4, D, dtype=torch.float64)
    for b, n in MASK.nonzero().tolist():
        for j in range(E):
            at = {0: (), 1: (b,), 2: (b, j), 3: (b, n, j), 4: (b, n, 3, j)}[len(shape)]
            slow[b, n] += w64[at] * p["experts.lora_B"][j] @ (p["experts.lora_A"][j] @ x64[b, n])
    agree(moe(x), [x, weights, *moe.parameters()], slow, [x64, w64, *p.values()])


def test_no_expert_runs_for_a_weight_of_zero():
    moe = MoE(InputWeights(D, E), LoRA(E, D, rank=2))
    moe.context.call.inputs["adapter_weights"] = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    assert moe.router(torch.randn(2, 4, D), moe.context).counts.tolist() == [4, 0, 4]


def test_weights_that_are_missing_or_do_not_fit_are_refused():
    moe = MoE(InputWeights(D, E), LoRA(E, D, rank=2))
    with pytest.raises(ValueError, match=r"under moeify\.context\.extra_inputs\(model, adapter_weights=weights\)"):
        moe(torch.randn(2, 4, D))
    for shape in ((1,), (2, E + 1), (2, 5, E)):
        moe.context.call.inputs["adapter_weights"] = torch.ones(shape)
        with pytest.raises(ValueError, match=r"fits neither the tokens \(2, 4\) of the layer nor their sequences"):
            moe(torch.randn(2, 4, D))


def library() -> nn.Module:
    recipe = Recipe(
        where=linears("q_proj|v_proj"),
        num_experts=E,
        router=InputWeights,
        experts=partial(lora, rank=2, scale=3.0),
        shared=frozen,
    )
    torch.manual_seed(0)
    model = sparsify(TINY["llama"](), recipe, verbose=False)
    for part in model.modules():
        if isinstance(part, LoRA):
            nn.init.normal_(part.lora_B)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(("depth", "k"), [(1, None), (3, 2)])
def test_it_computes_what_peft_computes(tmp_path, depth, k, layerwise):
    peft = pytest.importorskip("peft")
    model = library()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for j in range(E):
        adapter = peft.get_peft_model(TINY["llama"](), config)
        for name, part in model.named_modules():
            if isinstance(part, MoE):
                theirs = adapter.base_model.model.get_submodule(name)
                theirs.lora_A["default"].weight.data.copy_(part.experts.lora_A[j])
                theirs.lora_B["default"].weight.data.copy_(part.experts.lora_B[j])
        adapter.save_pretrained(tmp_path / str(j))
    dense = TINY["llama"]()
    dense.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=depth, xlora_size=16, softmax_temperature=0.5,
        layerwise_scalings=layerwise, top_k_lora=k, adapters={str(j): str(tmp_path / str(j)) for j in range(E)},
    )  # fmt: skip
    theirs = peft.get_peft_model(dense, config).eval()
    ours = XLoRA(model, 32, depth=depth, hidden=16, temperature=0.5, layerwise=layerwise, k=k).eval()
    ours.classifier.load_state_dict(theirs.base_model.internal_xlora_classifier.layers.state_dict())
    for parameter in ours.classifier.parameters():
        parameter.data.mul_(5)
    theirs.base_model.internal_xlora_classifier.layers.load_state_dict(ours.classifier.state_dict())
    ids = inputs(model)["input_ids"]
    expected = theirs(input_ids=ids).logits
    assert (expected - TINY["llama"]()(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_first_pass_is_the_model_without_adapters_and_only_the_network_learns_from_the_second():
    model = library()
    wrapped = XLoRA(model, 32, k=2)
    batch, rows = inputs(model), []
    watch = model.model.layers[0].self_attn.q_proj.experts.register_forward_hook(lambda m, a, y: rows.append(len(y)))
    weights = wrapped.weights(**batch)
    states = TINY["llama"]()(batch["input_ids"], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(
        (wrapped.classifier(states).softmax(-1) - weights[:, :, 0]).abs().min(), torch.tensor(0.0)
    )
    assert (weights != 0).sum(-1).eq(2).all()
    wrapped(**batch).loss.backward()
    watch.remove()
    assert sum(rows) == 2 * 24  # two of three adapters in the second pass, none in the first
    assert all(p.grad.any() for p in wrapped.classifier.parameters())


def test_what_x_lora_cannot_weigh_is_refused():
    with pytest.raises(ValueError, match="no layer with an InputWeights router"):
        XLoRA(TINY["llama"](), 32)
    with pytest.raises(ValueError, match="depth=0 must be a number of layers"):
        XLoRA(library(), 32, depth=0)
    with pytest.raises(ValueError, match="k=4 of 3 experts"):
        XLoRA(library(), 32, k=4)
    with pytest.raises(ValueError, match="pass use_cache=False"):
        XLoRA(library(), 32)(past_key_values=object())
