"""How layers lay out their tokens, and whether padding is read: seen in runs of a probe."""

import copy

import pytest
import torch
from torch import nn
from transformers import BigBirdConfig, BigBirdModel, BridgeTowerConfig, BridgeTowerModel

from layout_models import siglip, xlnet
from moeify import Recipe, record, sparsify
from moeify.find import ffn, modules
from moeify.find.probe import find_probe
from moeify.routers import Soft
from moeify.sparsify import fresh
from moeify.store import load, save
from plain_models import Block, Gated, sparse_layers, vit_mlp
from tiny_models import bert, tokens, widened

COPIES = Recipe(num_experts=4)


def test_a_square_batch_of_a_model_that_lays_sequences_out_first():
    model, ids, mask = xlnet(), tokens(6, 6), torch.ones(6, 6, dtype=torch.long)
    mask[1, 3:] = 0
    before = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    sparsify(model, Recipe(num_experts=4), verbose=False)
    torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state[mask.bool()], before)


@pytest.mark.parametrize("length", [5, 3])
def test_sequences_are_not_mixed_where_they_are_laid_out_first(length, tmp_path):
    recipe = Recipe(num_experts=4, router=Soft, experts=fresh)
    model = sparsify(xlnet(), recipe, allow_noncausal=True, verbose=False)
    save(model, tmp_path)
    ids = tokens(3, length)
    for one in (model, load(tmp_path).eval()):
        torch.testing.assert_close(one(ids)[0][1:2], one(ids[1:2])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positional", [True, False])
def test_a_given_probe_shows_the_layout_too(positional):
    model, ids = xlnet(), tokens(3, 5)
    recipe = Recipe(num_experts=4, router=Soft, experts=fresh)
    sparsify(model, recipe, probe=ids if positional else {"input_ids": ids}, allow_noncausal=True, verbose=False)
    assert {layer.context.batch_first for layer in sparse_layers(model).values()} == {False}


def test_padding_is_routed_where_the_model_reads_it(tmp_path):
    model, mask = siglip(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = {"input_ids": tokens(2, 4) % 96, "attention_mask": mask}  # the last position is pooled
    before = model(**given).pooler_output
    sparsify(model, Recipe(num_experts=4), verbose=False)
    save(model, tmp_path)
    for one in (model, copy.deepcopy(model), load(tmp_path).eval()):
        with record(one) as decisions:
            torch.testing.assert_close(one(**given).pooler_output, before, rtol=1e-4, atol=1e-4)
        assert {int(routing.counts.sum()) for routing in decisions.values()} == {2 * 8}


def test_padding_is_not_routed_in_other_stacks_nor_where_it_is_masked():
    routed = {
        kind: {layer.context.routes_padding for layer in sparse_layers(sparsify(model, COPIES, verbose=False)).values()}
        for kind, model in (("siglip", siglip()), ("bert", bert()))
    }
    assert routed == {"siglip": {True}, "bert": {False}}


class Towers(nn.Module):
    """Two stacks, the second of which only runs when asked for."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(Block(vit_mlp()), Block(vit_mlp()))
        self.second = nn.Sequential(second)

    def forward(self, x, both: bool = False):
        return self.second(self.first(x)) if both else self.first(x)


class Loose(nn.Module):
    """An inline feed-forward network that scales between its projections, or does not."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.act, self.down, self.scale = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), scale
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.down(self.scale * self.act(self.up(x))))


def test_what_a_probe_does_not_reach_is_verified_alone():
    sparsify(Towers(Loose(1.0)), COPIES, verbose=False)
    with pytest.raises(ValueError, match=r"second\.0\.up was read as a feed-forward network"):
        sparsify(Towers(Loose(0.5)), COPIES, verbose=False)


def test_what_cannot_be_reached_at_all_is_refused_unless_asked_for():
    class Pair(Loose):
        def forward(self, x, y):
            return super().forward(x) + y.shape[1]

    with pytest.raises(ValueError, match=r"the probe does not reach second\.0\.up.*verify=False"):
        sparsify(Towers(Pair(1.0)), COPIES, verbose=False)
    assert len(sparse_layers(sparsify(Towers(Pair(1.0)), COPIES, verify=False, verbose=False))) == 3


class Riddle(nn.Sequential):
    """A model whose input nobody guesses."""

    def forward(self, x: dict):
        if not isinstance(x, dict):
            raise TypeError("a question is wanted")
        return super().forward(x["question"])


def test_a_model_whose_input_is_not_guessed_is_refused_unless_it_is_probed_or_verify_is_off():
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"no input could be guessed for this Riddle.*probe=.*verify=False"):
        sparsify(Riddle(Loose(1.0)), COPIES, verbose=False)
    with pytest.raises(ValueError, match=r"0\.up was read as a feed-forward network"):
        sparsify(Riddle(Loose(0.5)), COPIES, probe=({"question": x},), verbose=False)
    sparsify(Riddle(Loose(1.0)), COPIES, probe=({"question": x},), verbose=False)
    wrong = Riddle(Loose(0.5))
    before = wrong({"question": x})
    sparsify(wrong, COPIES, verify=False, verbose=False)
    assert (wrong({"question": x}) - before).abs().max() > 0.05  # which nothing has shown
    with pytest.raises(ValueError, match="leave out one of the two"):
        sparsify(Riddle(Loose(1.0)), COPIES, probe=x, verify=False)


def test_a_model_without_values_is_refused_unless_verify_is_off():
    with torch.device("meta"):
        model = nn.Sequential(Block(vit_mlp()))
    with pytest.raises(ValueError, match=r"no values \(its parameters are on the meta device\)"):
        sparsify(model, COPIES, verbose=False)
    assert sparse_layers(sparsify(model, COPIES, verify=False, verbose=False))


class Named(nn.Module):
    """A layer that calls its network by keyword."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return x + self.ffn(x=x)


@pytest.mark.parametrize("where", [ffn, modules("ffn$")])
def test_a_module_that_is_called_by_keyword_is_replaced(where, tmp_path):
    def build():
        return nn.Sequential(Named(Gated()), Named(Gated()))

    model, x = widened(build()), torch.randn(2, 5, 8)
    before = model(x)
    sparsify(model, Recipe(num_experts=4, where=where), verbose=False)
    save(model, tmp_path)
    for one in (model, load(tmp_path, build())):
        torch.testing.assert_close(one(x), before, rtol=1e-4, atol=1e-4)


def test_a_module_that_is_given_more_than_tokens_is_refused():
    class Layer(Block):
        def forward(self, x):
            return x + self.ffn(x, 3)

    class Two(Gated):
        def forward(self, x, layer=None):
            return super().forward(x)

    with pytest.raises(ValueError, match=r"0\.ffn \(Two\) cannot be an expert: .* more than its tokens \(layer\)"):
        sparsify(nn.Sequential(Layer(Two())), COPIES, verbose=False)


def test_a_probe_leaves_no_trace():
    config = BigBirdConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, block_size=4, num_random_blocks=1)  # fmt: skip
    model = BigBirdModel(config).eval()
    attention = [type(part) for part in model.modules()]
    probe = find_probe(model)
    probe.run(model)
    assert model.attention_type == model.config.attention_type == "block_sparse"
    assert [type(part) for part in model.modules()] == attention


def test_buffers_and_attributes_that_a_call_changes_are_as_they_were():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return super().forward(x)

    model = Counting()
    find_probe(model).run(model)
    assert (model.calls, model.seen.item()) == (0, 0)


def test_a_model_that_masks_its_padding_is_not_refused():
    sparsify(bert(), Recipe(num_experts=4), verbose=False)


class MaskedLayer(Block):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


class Tower(nn.Module):
    """A stack whose layers the model calls itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MaskedLayer(Gated())])


class WordsAndPatches(nn.Module):
    """Two stacks, of which the layers of the patches are given no mask (BridgeTower)."""

    def __init__(self):
        super().__init__()
        self.words, self.patches = Tower(), Tower()

    def forward(self, inputs_embeds, attention_mask, patches):
        for layer in self.words.layers:
            inputs_embeds = layer(inputs_embeds, attention_mask[:, None, None])
        for layer in self.patches.layers:
            patches = layer(patches)
        return inputs_embeds, patches.mean(1)


def test_a_stack_of_as_many_tokens_has_not_the_padding_of_another():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = {"inputs_embeds": torch.randn(2, 4, 8), "attention_mask": mask, "patches": torch.randn(2, 4, 8)}
    model = sparsify(WordsAndPatches(), COPIES, probe=given, verbose=False)
    with record(model) as decisions:
        model(**given)
    assert [int(routing.counts.sum()) for routing in decisions.values()] == [2 * 6, 2 * 8]


class CrossModal(nn.Module):
    """Layers of words and of patches side by side in the module that is given the mask of the words (BridgeTower)."""

    def __init__(self, own: bool):
        super().__init__()
        self.own = own
        self.words, self.patches = nn.ModuleList([MaskedLayer(Gated())]), nn.ModuleList([MaskedLayer(Gated())])

    def forward(self, inputs_embeds, attention_mask, patches):
        words = self.words[0](inputs_embeds, attention_mask[:, None, None])
        patches = self.patches[0](patches, attention_mask.flip(0)[:, None, None] if self.own else None)
        return words, patches.mean(1)


@pytest.mark.parametrize(("own", "tokens"), [(False, 8), (True, 5)])
def test_a_stack_beside_another_one_has_the_padding_that_its_layers_are_given(own, tokens):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    given = {"inputs_embeds": torch.randn(2, 4, 8), "attention_mask": mask, "patches": torch.randn(2, 4, 8)}
    model = sparsify(CrossModal(own), COPIES, verify=False, verbose=False)
    with record(model) as decisions:
        model(**given)
    words, patches = decisions.values()
    assert [int(words.counts.sum()), int(patches.counts.sum())] == [2 * 5, 2 * tokens]
    if own:
        assert not torch.equal(words.source, patches.source)


def test_a_layer_beside_as_many_words_is_not_given_their_padding():
    vision = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, pad_token_id=1,
        vision_config=vision, text_config=text | {"vocab_size": 32, "max_position_embeddings": 16},
    )  # fmt: skip
    model = widened(BridgeTowerModel(config)).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])  # as many words as patches with the one before them
    given = {"input_ids": torch.randint(5, 32, (2, 5)), "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    before = model(**given)
    sparsify(model, COPIES, verbose=False)
    after = model(**given)
    torch.testing.assert_close(after.image_features, before.image_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        after.text_features[mask.bool()], before.text_features[mask.bool()], rtol=1e-4, atol=1e-5
    )
