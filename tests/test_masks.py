"""What masks of every form say of padding."""

from functools import partial

import pytest
import torch
from torch import nn

from layout_models import idefics2
from moeify import Context, Recipe, masks, record, sparsify
from moeify.find.where import named
from moeify.routers import TopK
from strategies import sharpen

REAL = torch.tensor([[True, True, True], [True, False, False]])
ADDED = torch.zeros(2, 3).masked_fill(~REAL, -10_000.0)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).tril()


@pytest.mark.parametrize("mask", [REAL, REAL.long(), REAL.float(), ADDED, ADDED.masked_fill(REAL, 3.0)])
def test_a_mask_of_tokens(mask):
    assert torch.equal(masks.real_tokens(mask), REAL)


def test_a_mask_of_zeros_that_is_added_hides_nothing():
    assert masks.real_tokens(torch.zeros(2, 3)).all()
    assert not masks.real_tokens(torch.zeros(2, 3, dtype=torch.long)).any()


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", REAL[:, None, None]),
        ("attention_mask", CAUSAL & REAL[:, None, None]),
        ("attention_mask", ADDED[:, None, None].expand(2, 4, 3, 3)),
        ("attention_mask", ADDED[:, None].expand(2, 3, 3)),
        ("encoder_padding_mask", ~REAL),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (6,)])
def test_the_mask_of_a_layer(name, mask, shape):
    assert torch.equal(masks.of_layer(name, mask, shape), REAL)


def test_a_mask_of_other_tokens_is_none_of_this_layer():
    assert masks.of_layer("attention_mask", REAL, (2, 4)) is None
    assert masks.of_layer("attention_mask", REAL, (4, 2)) is None


def test_streams_of_the_same_tokens_share_a_mask():
    assert torch.equal(masks.of_layer("attention_mask", REAL, (2, 6)), REAL.repeat(1, 2))


class Layer(nn.Module):
    def forward(self, x, attention_mask=None):
        return x


class Halved(nn.Module):
    """A model whose layers have half as many tokens as it is given, or as many if it is told to keep them."""

    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def forward(self, input_features, attention_mask=None, keep=False):
        short = attention_mask if keep or attention_mask is None else attention_mask[:, ::2]
        return self.layer(input_features, short)


@pytest.mark.parametrize(("keep", "seen"), [(False, [0, 1, 2]), (True, [0, 1, 2, 3, 4])])
def test_a_layer_with_tokens_of_its_own_is_given_their_mask(keep, seen):
    model, context, found = Halved(), Context(), []
    context.watch([model], [model.layer])
    shape = (2, 4) if keep else (2, 2)
    model.layer.register_forward_pre_hook(lambda *args: found.append(context.real(shape)))
    model(torch.randn(2, 4, 8), attention_mask=torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]), keep=keep)
    model(torch.randn(2, 4, 8))
    assert found[0].tolist() == seen
    assert found[1] is None


def test_a_layer_that_lays_sequences_out_first_reads_the_mask_so():
    model, context, found = Halved(), Context(), []
    context.watch([model], [model.layer])
    model.layer.register_forward_pre_hook(lambda *args: found.append(context.real((3, 2)).tolist()))
    model(torch.randn(2, 3, 8), attention_mask=REAL, keep=True)
    assert found == [REAL.T.flatten().nonzero().flatten().tolist()]


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_padding_of_images_is_not_routed(per):
    model = idefics2()
    recipe = Recipe(where=named("vision_model"), router=partial(TopK, per=per))
    sparsify(model, recipe, allow_noncausal=True, verbose=False)
    sharpen(model)
    images, real = torch.randn(1, 2, 3, 32, 32), torch.ones(1, 2, 32, 32, dtype=torch.long)
    real[0, 0, 16:] = real[0, 0, :, 24:] = 0  # the first image has 2 x 3 patches of 4 x 4

    def features(images, real):
        return torch.cat([*model.get_image_features(images, real).pooler_output])

    with record(model) as decisions:
        together = features(images, real)
    assert next(iter(decisions.values())).counts.sum() == (2 * 3 + 4 * 4) * 2
    first = features(images[:, :1, :, :16, :24], real[:, :1, :16, :24])
    torch.testing.assert_close(together, torch.cat([first, features(images[:, 1:], real[:, 1:])]))
