"""Where sparse layers go, and what is said if they cannot go there."""

import pytest
import torch
from torch import nn

from moeify.experts import Each
from moeify.find import chosen, every, ffn, last, last_half, modules, named, odd
from moeify.sparsify import Recipe, fresh, sparsify
from plain_models import Block, Gated, Strange, blocks, sparse_layers
from tiny_models import DENSE, SPARSE, causal_lm, t5, widened


def names(where, model) -> list[str]:
    return [site.name for site in where(model)]


def llama(layers: int = 4) -> nn.Module:
    return causal_lm("llama", num_hidden_layers=layers)


def mlps(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.mlp" for layer in layers]


def test_every_feed_forward_network_is_found_by_default():
    assert names(ffn, llama()) == mlps(0, 1, 2, 3)


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        (every(1), [0, 1, 2, 3]),
        (every(2), [1, 3]),
        (every(3), [2]),
        (every(9), [3]),
        (odd, [1, 3]),
        (last(1), [3]),
        (last(2), [2, 3]),
        (last(9), [0, 1, 2, 3]),
        (last_half, [2, 3]),
        (named(r"layers\.[02]\."), [0, 2]),
        (modules(r"mlp$"), [0, 1, 2, 3]),
        (modules(r"layers\.3\.mlp"), [3]),
        (chosen(lambda name, dense: "1" in name and dense.hidden == 64), [1]),
    ],
)
def test_layers_are_chosen_as_said(where, layers):
    assert names(where, llama()) == mlps(*layers)


@pytest.mark.parametrize("where", [every(2), odd, last(1), last_half])
def test_choices_count_in_every_stack_of_its_own(where):
    found = names(where, t5(num_layers=2))
    assert found == ["encoder.block.1.layer.1.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense"]


def test_only_the_chosen_layers_change():
    model = sparsify(llama(), Recipe(num_experts=4, where=every(2)), verbose=False)
    assert list(sparse_layers(model)) == mlps(1, 3)


def test_a_pattern_that_matches_nothing_is_answered_with_the_names():
    with pytest.raises(ValueError, match=r"nothing matches 'mpl'; there are: model\.layers\.0\.mlp"):
        named("mpl")(llama())
    with pytest.raises(ValueError, match="nothing matches 'mpl'"):
        modules("mpl")(llama())


def test_modules_without_a_linear_map_are_not_offered_to_experts():
    with pytest.raises(ValueError, match="nothing matches 'layernorm'"):
        modules("layernorm")(llama())


def test_a_model_without_feed_forward_networks_is_refused():
    with pytest.raises(ValueError, match=r"no feed-forward network was found in this Sequential.*where=modules"):
        ffn(nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8)))


def test_a_sparse_model_is_refused():
    model = sparsify(llama(), Recipe(num_experts=4), verbose=False)
    with pytest.raises(ValueError, match="sparse already"):
        sparsify(model, Recipe(num_experts=4))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_a_mixture_of_experts_of_transformers_is_refused(family):
    with pytest.raises(ValueError, match=r"sparse already \(see model\.layers\.0\.mlp"):
        ffn(SPARSE[family]())


def test_the_dense_layers_of_a_mixture_of_experts_are_found():
    assert names(ffn, SPARSE["deepseek_v3"]()) == mlps(0)


def test_experts_of_a_handmade_mixture_are_left_out():
    class Handmade(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList([Gated(), Gated()])

        def forward(self, x):
            gates = self.router(x).softmax(-1)
            return sum(gates[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))

    assert names(ffn, nn.Sequential(Block(Gated()), Block(Handmade()))) == ["0.ffn"]
    with pytest.raises(ValueError, match=r"sparse already \(see 0\.ffn\.experts\.0\)"):
        ffn(nn.Sequential(Block(Handmade())))


def test_a_strange_module_is_named_with_the_way_out_and_the_way_out_works():
    model = widened(nn.Sequential(Block(Strange()), *blocks(1))).eval()
    with pytest.raises(ValueError, match=r"0\.ffn \(Strange\) has the linear maps.*where=modules\(r'0\\\.ffn\$'\)"):
        sparsify(model, Recipe(num_experts=4), verbose=False)
    x = torch.randn(2, 5, 8)
    before = model(x)
    sparsify(model, Recipe(num_experts=4, where=modules(r"0\.ffn$")), verbose=False)
    assert isinstance(model[0].ffn.experts, Each)
    torch.testing.assert_close(model(x), before)


def test_modules_of_several_names_give_the_outermost():
    model = nn.Sequential(*blocks(2))
    assert names(modules("ffn"), model) == ["0.ffn", "1.ffn"]


def test_heads_and_projections_are_no_layers():
    model = DENSE["clip"]()
    model.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    assert all(".layers." in name for name in names(ffn, model))


def test_fresh_experts_of_whole_modules_differ():
    recipe = Recipe(num_experts=2, where=modules(r"0\.ffn$"), experts=fresh)
    model = sparsify(nn.Sequential(*blocks(1)), recipe, verbose=False)
    one, other = sparse_layers(model)["0.ffn"].experts.experts
    assert not torch.equal(one.gamma.weight, other.gamma.weight)


@pytest.mark.parametrize("where", [every(0), last(0), last(-1)])
def test_none_of_the_layers_is_no_choice(where):
    with pytest.raises(ValueError, match="n must be a whole number from 1 on"):
        where(llama())


def test_a_single_map_in_a_sequential_and_batch_statistics_are_no_network():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.ffn, self.out, self.drop = (
                Gated(),
                nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)),
                nn.Sequential(nn.Dropout(0.1)),
            )
            self.batch = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x):
            return self.batch(self.drop(self.out(self.ffn(x))))

    assert names(ffn, nn.Sequential(Attention())) == ["0.ffn"]
