"""Copies under weights that sum to 1 are the dense model: whatever model, whatever shape its FFN is in."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig

from moeify import MoE, record
from moeify.routers import TopK
from moeify.sparsify import Recipe, sparsify
from plain_models import (
    Block,
    Gated,
    Recommender,
    Residual,
    Strange,
    blocks,
    encoder,
    output,
    sparse_layers,
    tower,
    vit_mlp,
)  # fmt: skip
from tiny_models import DENSE, causal_lm, image_classifier, inputs, masked_lm, widened

COPIES = Recipe(num_experts=4)
ONE = Recipe(num_experts=1, router=partial(TopK, k=1))

FAMILIES = {
    **DENSE,
    **{
        name: partial(causal_lm, name)
        for name in (
            "gemma2", "gemma3_text", "qwen2", "olmo2", "cohere", "stablelm", "phi", "granite", "starcoder2",
            "gpt_neox", "nemotron", "glm4", "smollm3", "exaone4", "seed_oss", "diffllama",
        )
    },
    "falcon": lambda: AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": partial(causal_lm, "bloom", n_layer=2, n_head=4),
    "gptj": partial(causal_lm, "gptj", n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    **{
        name: partial(masked_lm, name)
        for name in ("roberta", "deberta", "deberta-v2", "camembert", "mpnet", "nystromformer")
    },
    "electra": partial(masked_lm, "electra", embedding_size=32),
    "albert": partial(masked_lm, "albert", embedding_size=32),
    "esm": partial(masked_lm, "esm", pad_token_id=1, mask_token_id=2),
    "distilbert": partial(masked_lm, "distilbert", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    **{name: partial(image_classifier, name) for name in ("dinov2", "dinov2_with_registers", "beit")},
    "swin": partial(
        image_classifier, "swin",
        patch_size=4, embed_dim=16, depths=[1, 2], num_attention_heads=[4, 4], num_hidden_layers=2, window_size=4,
    ),
}  # fmt: skip


def assert_same(model, given, recipe=COPIES, **tolerance):
    """Require that a model made sparse by copies is what it was, and that every expert learns; returns it."""
    model.eval()
    with torch.no_grad():
        before = output(model, given)
    sparsify(model, recipe, verbose=False)
    with torch.no_grad(), record(model) as decisions:
        torch.testing.assert_close(output(model, given), before, **tolerance)
    assert decisions.keys() == sparse_layers(model).keys(), "a sparse layer was passed by"
    output(model, given).square().sum().backward()
    for name, layer in sparse_layers(model).items():
        for key, parameter in layer.experts.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_leave_a_model_of_transformers_as_it_was(family):
    model = widened(FAMILIES[family]())
    layers = sparse_layers(assert_same(model, inputs(model), rtol=1e-3, atol=1e-4))
    assert len(layers) >= 1 if family == "albert" else len(layers) >= 2  # the layers of ALBERT share one FFN


@pytest.mark.parametrize("family", DENSE)
def test_a_single_expert_is_the_dense_network(family):
    model = widened(DENSE[family]())
    assert_same(model, inputs(model), ONE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "opt", "phi3"])
def test_a_single_expert_is_the_dense_network_bit_by_bit(family):
    model = DENSE[family]()
    assert_same(model, inputs(model), ONE, rtol=0, atol=0)


@pytest.mark.parametrize(("family", "stacks"), [("t5", 2), ("bart", 2), ("clip", 2), ("whisper", 2), ("llama", 1)])
def test_every_stack_of_a_model_is_served(family, stacks):
    model = sparsify(DENSE[family](), COPIES, verbose=False)
    layers = sparse_layers(model)
    assert len(layers) == 2 * stacks
    assert len({id(layer.context) for layer in layers.values()}) == stacks


@pytest.mark.parametrize("family", ["whisper", "bart"])
def test_dropout_between_the_maps_moves_into_the_experts(family):
    model = DENSE[family]()
    for part in model.modules():
        if hasattr(part, "activation_dropout"):
            part.activation_dropout = 0.25
    sparsify(model, COPIES, verbose=False)
    assert {layer.experts.dropout.p for layer in sparse_layers(model).values()} == {0.25}
    assert {getattr(part, "activation_dropout", 0.0) for part in model.modules()} == {0.0}


def test_dropout_after_the_down_map_stays_after_it():
    model = sparsify(DENSE["gpt2"](), COPIES, verbose=False)
    mlp = model.transformer.h[0].mlp
    assert isinstance(mlp[0], MoE)
    assert mlp[1].p == model.config.resid_pdrop > 0
    assert mlp[0].experts.dropout.p == 0
    model.train()
    assert (mlp(torch.randn(2, 50, 32)) == 0).any()


def test_dropout_between_the_maps_of_t5_moves_into_the_experts():
    model = sparsify(DENSE["t5"](), COPIES, verbose=False)
    assert {layer.experts.dropout.p for layer in sparse_layers(model).values()} == {model.config.dropout_rate}


PLAIN = {
    "a gated FFN of unusual names": (lambda: nn.Sequential(*blocks(2)), (2, 5, 8), 2),
    "one with biases": (lambda: nn.Sequential(Block(Gated(bias=True))), (2, 5, 8), 1),
    "a sequential FFN": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), (7, 8), 1),
    "the MLP of a ViT": (lambda: nn.Sequential(Block(vit_mlp()), Block(vit_mlp())), (2, 5, 8), 2),
    "a tower": (tower, (7, 16), 1),
    "a tower behind a change of shape": (lambda: nn.Sequential(nn.Flatten(), *tower()), (7, 4, 4), 1),
    "a tower in a model": (lambda: nn.Sequential(nn.Linear(16, 16), tower()), (7, 16), 1),
    "an encoder": (encoder, (2, 5, 16), 2),
    "an encoder, sequence first": (partial(encoder, batch_first=False), (5, 2, 16), 2),
    "an encoder with norms first": (partial(encoder, norm_first=True, activation="gelu"), (2, 5, 16), 2),
    "an encoder without biases": (partial(encoder, bias=False), (2, 5, 16), 2),
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_copies_leave_a_plain_model_as_it_was(kind):
    build, shape, layers = PLAIN[kind]
    model = assert_same(widened(build()), (torch.randn(shape),), rtol=1e-4, atol=1e-4)
    assert len(sparse_layers(model)) == layers


def test_copies_leave_a_plain_encoder_decoder_as_it_was():
    model = widened(nn.Transformer(16, 2, 2, 2, 32, batch_first=True))
    model = assert_same(model, (torch.randn(2, 5, 16), torch.randn(2, 4, 16)), rtol=1e-4, atol=1e-4)
    assert len(sparse_layers(model)) == 4


def test_copies_leave_a_recommender_as_it_was():
    given = (torch.randint(20, (9,)), torch.randint(30, (9,)))
    model = widened(Recommender()).eval()
    with torch.no_grad():
        before = model(*given)
        sparsify(model, COPIES, probe=given, verbose=False)
        torch.testing.assert_close(model(*given), before)
    assert list(sparse_layers(model)) == ["tower.0"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_the_fast_path_of_torch_does_not_pass_by_the_experts(batch_first):
    model = encoder(batch_first=batch_first).eval()
    x, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[5], [3]])
    x = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        sparsify(model, COPIES, verbose=False)
        with record(model) as decisions:
            after = model(x, src_key_padding_mask=padding)
    assert len(decisions) == 2
    assert {int(routing.counts.sum()) for routing in decisions.values()} == {2 * 8}  # eight real tokens, two experts
    real = ~padding if batch_first else ~padding.T
    torch.testing.assert_close(after[real], before[:, : after.shape[1]][real], rtol=1e-4, atol=1e-4)


def test_an_ffn_that_adds_its_residual_is_found():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn = Residual()

        def forward(self, x):
            return self.ffn(x, x)

    model = assert_same(nn.Sequential(Layer(), Layer()), (torch.randn(2, 5, 8),), rtol=1e-5, atol=1e-5)
    assert list(sparse_layers(model)) == ["0.ffn.up", "1.ffn.up"]


def test_a_model_that_draws_random_numbers_is_compared_on_the_same_ones():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*blocks(2))

        def forward(self, x):
            return self.layers(x + torch.randn_like(x))

    assert len(sparse_layers(sparsify(Noisy(), COPIES, verbose=False))) == 2


def test_the_mode_of_every_part_survives():
    model = DENSE["llama"]().train()
    model.model.layers[0].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    sparsify(model, COPIES, verbose=False)
    assert all(part.training == modes[name] for name, part in model.named_modules() if name in modes)
    assert [layer.router.training for layer in sparse_layers(model).values()] == [False, True]


def test_the_state_of_the_random_generator_is_its_users():
    model = DENSE["vit"]()
    torch.manual_seed(3)
    one = sparsify(copy.deepcopy(model), COPIES, verbose=False)
    torch.manual_seed(3)
    other = sparsify(copy.deepcopy(model), COPIES, probe=inputs(model), verbose=False)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_something_else_made_of_the_same_parts_is_refused():
    model = nn.Sequential(Block(Strange()), Block(Strange()))
    with pytest.raises(ValueError, match=r"0\.ffn \(Strange\).*where=modules"):
        sparsify(model, COPIES, verbose=False)


def test_what_only_the_whole_model_shows_to_be_something_else_is_refused():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
            self.norm = nn.LayerNorm(12)

        def forward(self, x):
            return x + self.down(self.norm(self.act(self.up(x))))

    model = nn.Sequential(*blocks(1), Normed())
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"1\.up was read as a feed-forward network"):
        sparsify(model, COPIES, verbose=False)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_half_precision_is_no_excuse(family):
    model = widened(DENSE[family]()).bfloat16()
    before = output(model, inputs(model))
    sparsify(model, COPIES, verbose=False)
    change = (output(model, inputs(model)) - before).abs().max() / before.abs().max()
    assert change < 0.05
