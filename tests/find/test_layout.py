"""How layers lay out their tokens, and whether padding is read: seen in runs of a probe."""

import pytest
import torch
from torch import nn
from transformers import BigBirdConfig, BigBirdModel, SiglipTextConfig, SiglipTextModel, XLNetConfig, XLNetModel

from moeify import Recipe, sparsify
from moeify.find.probe import find_probe
from moeify.routers import Soft
from moeify.sparsify import fresh
from moeify.store import load, save
from plain_models import sparse_layers
from tiny_models import bert, tokens, widened


def xlnet() -> XLNetModel:
    return widened(XLNetModel(XLNetConfig(vocab_size=256, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval())


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


def test_a_model_that_reads_padding_is_refused_unless_it_is_probed_without():
    config = SiglipTextConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4)  # fmt: skip
    model, given = widened(SiglipTextModel(config).eval()), {"input_ids": tokens(2, 8) % 96}
    with pytest.raises(ValueError, match="make of padding"):
        sparsify(model, Recipe(num_experts=4), verbose=False)
    assert not sparse_layers(model)
    sparsify(model, Recipe(num_experts=4), probe=given, verbose=False)
    assert sparse_layers(model)


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
