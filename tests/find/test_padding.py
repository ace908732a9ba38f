"""Padding in a probe: outputs there are nobody's, unless the model reads at real tokens what becomes of it."""

import pytest
import torch
from torch import nn
from transformers import SeamlessM4TConfig, SeamlessM4TForSpeechToText

from layout_models import idefics2
from moeify import Recipe, record, sparsify
from plain_models import Block, Gated, sparse_layers
from tiny_models import widened

COPIES = Recipe(num_experts=4)


def test_a_probe_with_padded_images_is_no_reason_to_refuse():
    model = widened(idefics2())
    images, real = torch.randn(2, 1, 3, 32, 32), torch.ones(2, 1, 32, 32, dtype=torch.long)
    real[0, 0, 16:] = real[0, 0, :, 24:] = 0  # the first image has 2 x 3 patches of 4 x 4
    ids = torch.tensor([[1, 30, 30, 4, 5, 6], [1, 30, 30, 4, 7, 0]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": images}
    given["pixel_attention_mask"] = real
    before = model(**given)
    sparsify(model, COPIES, probe=given, verbose=False)
    with record(model) as decisions:
        after = model(**given)
    patches, latents, words = (int(routing.counts.sum()) for routing in decisions.values())
    assert (patches, latents, words) == (2 * (2 * 3 + 4 * 4), 2 * 4, 2 * 11)
    text = given["attention_mask"].bool()
    torch.testing.assert_close(after.last_hidden_state[text], before.last_hidden_state[text], rtol=1e-4, atol=1e-5)
    latents = [torch.cat([*each.image_outputs.pooler_output]) for each in (after, before)]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-5)


class Last(nn.Module):
    """A tower of which the last token of every image is taken, be it padding or not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MaskedBlock(Gated())])

    def forward(self, patches, pixel_attention_mask):
        return self.layers[0](patches, pixel_attention_mask[:, None, None])[:, -1]


class MaskedBlock(Block):
    def forward(self, x, attention_mask):
        return super().forward(x)


def test_the_padding_of_a_probe_without_text_shows_that_it_is_read():
    given = {"patches": torch.randn(2, 4, 8), "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    model = Last()
    before = model(**given)
    sparsify(model, COPIES, probe=given, verbose=False)
    torch.testing.assert_close(model(**given), before, rtol=1e-4, atol=1e-5)
    assert sparse_layers(model)["layers.0.ffn"].context.routes_padding


@pytest.mark.parametrize("sequences", [3, 4, 7])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_probe_with_padded_sequences_is_no_reason_to_refuse_wherever_sequences_are_laid_out(batch_first, sequences):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    x, padding = torch.randn(sequences, 7, 16), torch.zeros(sequences, 7, dtype=torch.bool)
    padding[1, 4:] = True
    given = {"src": x if batch_first else x.transpose(0, 1), "src_key_padding_mask": padding}
    real = ~padding if batch_first else ~padding.T
    before = model(**given)[real]
    sparsify(model, Recipe(num_experts=4), probe=given, verbose=False)
    torch.testing.assert_close(model(**given)[real], before, rtol=1e-4, atol=1e-5)


def test_a_sound_whose_padding_is_mixed_into_real_tokens_has_its_padding_routed():
    sizes = {"vocab_size": 64, "t2u_vocab_size": 64, "hidden_size": 32, "feature_projection_input_dim": 16}
    config = SeamlessM4TConfig(**sizes, adaptor_kernel_size=4, adaptor_stride=4, max_position_embeddings=64)
    for name in vars(config):
        if name.endswith(("ffn_dim", "intermediate_size")):
            setattr(config, name, 48)
        if name.endswith("attention_heads"):
            setattr(config, name, 2)
        if name.endswith("_layers") and name != "num_hidden_layers":
            setattr(config, name, 1)
    model = widened(SeamlessM4TForSpeechToText(config)).eval()
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 12:] = 0
    inputs = {"input_features": torch.randn(2, 24, 16), "attention_mask": mask}
    inputs["decoder_input_ids"] = torch.randint(5, 64, (2, 6))
    before = model(**inputs).logits
    sparsify(model, Recipe(num_experts=2), verbose=False)
    assert torch.allclose(model(**inputs).logits, before, atol=1e-4)
